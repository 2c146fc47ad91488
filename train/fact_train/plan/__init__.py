"""`fact-train plan`: what a step costs on chips that are not here.

``abstract_task`` builds the task without weights; ``compilation`` compiles its real step for a
topology, in a process of its own; ``compiled_stats`` reads sizes and FLOPs, ``hlo`` the collectives
and ``hbm_traffic`` the memory traffic from it; ``report`` tells whether it fits, and why.
"""
