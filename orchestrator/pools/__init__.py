"""Pools of Ray actors, and what a run asks of them.

From the inside out: roster.py (the members and who works with whom; no Ray), load.py (how busy they are), supervisor.py
(starts and watches the actors), actor_pool.py (one pool, made of these three), run_pools.py (all pools of a run, with
start_up.py), rollout_service.py (the work that they are given). ray_session.py is the connection to Ray, resources.py
describes what a cluster has and lacks.
"""
