"""FACT+ on Stable Diffusion 1.5: ``sd15_fact``, after 20,000 steps of the resampler alone.

fact-train run sd15_fact_plus --out runs/sd15_fact_plus

In these steps the resampler learns, on 16,384 of the records' photos, to give face tokens of which
a linear map tells the encoder's embedding; then it is trained on with the adapter. On the miniature
this took similarity to another photo of the person from 0.43 to 0.56 (`miniature/README.md`); at
this size it has not been run. Adapter files are of the same form as ``sd15_fact``'s. Models,
records and hardware are those of ``sd15_fact``.
"""

from dataclasses import replace

from fact_train.configs.sd15_fact import config as sd15_fact

config = replace(sd15_fact, options=replace(sd15_fact.options, pretrain_resampler=20_000))
