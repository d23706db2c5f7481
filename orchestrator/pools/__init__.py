"""Pools of Ray actors, and what a run asks of them.

From the inside out: roster.py (who is there; no Ray), load.py (how busy), supervisor.py (what Ray says), actor_pool.py
(one pool, of the three), run_pools.py (all pools of a run, with start_up.py), rollout_service.py (what they are asked
to do). ray_session.py is the connection to Ray, resources.py what a cluster has and lacks.
"""
