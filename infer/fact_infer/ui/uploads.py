"""What a browser may name as a file: what was uploaded here, and nothing else."""

from typing import Any

import gradio as gr
from gradio import utils

from fact_jax.utils.errors import printable


class UploadsOnly(gr.Blocks):
    """Blocks that open no path and no address of a request.

    Gradio's own check is for pages that it launched itself: in one that is mounted in an
    application it is passed over, and addresses are fetched in either.
    """

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Before the components see what came: gr.Error for a file that was not uploaded."""
        check_uploaded(inputs)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def check_uploaded(value: Any) -> None:
    """gr.Error unless every ``path`` in a value of JSON lies in the folder of uploads."""
    if isinstance(value, dict):
        path = value.get("path")
        # An address has no place among paths, and would be fetched.
        if isinstance(path, str) and (
            "://" in path or not utils.is_in_or_equal(path, utils.get_upload_folder())
        ):
            raise gr.Error(f"{printable(path)[:80]} was not uploaded here", print_exception=False)
        value = list(value.values())
    for part in value if isinstance(value, list | tuple) else ():
        check_uploaded(part)
