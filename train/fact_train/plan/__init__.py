"""`fact-train plan`: what a step costs on a chip that is not there.

``abstract`` builds the task without weights, ``compiling`` compiles its real step for a topology
(in a process of its own), ``jaxprs`` counts its arithmetic, ``hlo`` reads its collectives and
``traffic`` its memory traffic, ``roofline`` turns these into seconds, ``report`` tells it all.
"""
