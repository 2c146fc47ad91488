"""Pre-registered questions of the laboratory, one file each: ``fact-train lab``.

All variants train the same number of steps on the same people; what is not said is as in ``fact``.
"""
