"""`fact-train plan`: what a step costs on chips that are not here.

``abstract_task`` builds the task without weights; ``compiled_stats`` compiles its real step for a
topology, in a process of its own (``fact_jax.plan``), and reads sizes, FLOPs, traffic and
collectives; ``report`` tells whether it fits, and why.
"""
