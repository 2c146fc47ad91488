"""`fact-infer plan`: what a generation costs on chips that are not here.

``abstract_pipeline`` builds the JAX pipeline without weights and traces its three programs;
``compiled_stats`` compiles them for a chip, in a process of its own (``fact_jax.plan``);
``report`` tells whether they fit, for how many pictures at a time, and how long they take.
"""
