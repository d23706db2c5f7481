"""One rank of the reward models' ZeRO-3 test: trains, measures, checkpoints, and writes what it holds."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from euphonium.config import OrmConfig, TrainingGroupConfig, load_config
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel
from learners.engine.zero3 import quiet_deepspeed, reward_engine, shard
from learners.rewards.outcome import OrmTraining
from learners.rewards.preference import PrmTask
from learners.rewards.training import fit
from tests.learners.rewards.toy_preferences import CPU, toy_preferences, toy_settings

KINDS = ("weights", "average", "exp_avg", "exp_avg_sq")


def main() -> None:
    target = Path(sys.argv[1])
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    quiet_deepspeed()
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    config = load_config(target / "recipe.yaml")
    torch.manual_seed(0)
    model = ProcessRewardModel.from_generator(open_generator(config.model), 1).for_training()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings, data = toy_settings(eps=1e-4), toy_preferences()
    engine = reward_engine(model, settings, TrainingGroupConfig(num_workers=2))
    records: list[dict] = []
    fit(engine, PrmTask(data, data, settings, 0, CPU), settings, target / "checkpoints", "mark", records.append)
    state = {kind: engine.whole(kind) for kind in KINDS}
    with engine.averaged():
        measured = PrmTask(data, data, settings, 0, CPU).evaluate(engine, 24)
    engine.restore_averages(lambda name: start[name])
    with engine.averaged():
        at_start = PrmTask(data, data, settings, 0, CPU).evaluate(engine, 24)
    after = engine.whole("weights")
    torch.manual_seed(0)
    again = ProcessRewardModel.from_generator(open_generator(config.model), 1).for_training()
    other = reward_engine(again, settings, TrainingGroupConfig(num_workers=2))
    continued: list[dict] = []
    fit(other, PrmTask(data, data, settings, 0, CPU), settings, target / "died", "mark", continued.append)
    resumed = {kind: other.whole(kind) for kind in KINDS}
    orm = OrmConfig.model_validate_json((target / "orm.json").read_text())
    training = OrmTraining(orm, CPU)
    judge = reward_engine(training.model, orm.optimizer, TrainingGroupConfig(num_workers=2))
    fit(judge, training.task, orm.optimizer, target / "orm_checkpoints", "mark", lambda _: None)
    outcome = judge.whole("weights")
    held = sum(shard(p).numel() for p in engine.parameters.values())
    torch.save(
        {
            "state": state, "after": after, "records": records, "measured": measured, "at_start": at_start,
            "held": held, "resumed": resumed, "continued": continued, "outcome": outcome,
        },
        target / f"reward_rank_{engine.rank}.pt",
    )  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


main()
