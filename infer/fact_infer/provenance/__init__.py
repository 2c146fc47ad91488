"""What a picture's file says of where it comes from: IPTC's mark, C2PA, a watermark.

``fact_infer.output_images`` writes what :func:`current` says; :func:`use` sets it for the process.
"""

from fact_infer.provenance.settings import LEVELS, Provenance, current, marked, use

__all__ = ["LEVELS", "Provenance", "current", "marked", "use"]
