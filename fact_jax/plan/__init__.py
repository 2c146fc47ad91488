"""What programs cost on chips that are not here: for `fact-train plan` and `fact-infer plan`.

``targets`` says what the compilers need to know of a chip and ``chips`` what it can do;
``compilation`` asks a process of its own, where ``compiled_program`` compiles and reads: ``hlo``
the kernels and collectives, ``hbm_traffic`` the memory traffic. ``jaxpr_costs`` counts FLOPs,
``links`` the seconds of collectives, and ``roofline`` makes bounds of time of it all.
"""
