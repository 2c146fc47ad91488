"""The few classes of ComfyUI that our nodes touch, as far as they do, and its UNet's order.

Written after ComfyUI 0.3.64: ``comfy_api.latest``, ``comfy.model_patcher.ModelPatcher``,
``comfy.ops.manual_cast``, ``folder_paths``, and the forward pass of a transformer block.
"""

import copy
import dataclasses
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fact_infer.torch.attention_processors import text_blocks

NODES = Path(__file__).parents[3] / "infer" / "comfyui"


class ModelPatcher:
    """A model and the options that its calls get; clones share the model, not the options."""

    def __init__(self, model: nn.Module, load_device: Any, offload_device: Any):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.model_options: dict = {"transformer_options": {}}
        self.additional_models: dict[str, list[ModelPatcher]] = {}

    def clone(self) -> "ModelPatcher":
        new = ModelPatcher(self.model, self.load_device, self.offload_device)
        new.model_options = copy.deepcopy(self.model_options)
        new.additional_models = {
            key: [one.clone() for one in models] for key, models in self.additional_models.items()
        }
        return new

    def set_model_patch(self, patch: Any, name: str) -> None:
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[name] = [*patches.get(name, []), patch]

    def set_model_attn2_patch(self, patch: Any) -> None:
        self.set_model_patch(patch, "attn2_patch")

    def set_additional_models(self, key: str, models: list["ModelPatcher"]) -> None:
        self.additional_models[key] = models

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)


class ProgressBar:
    """``comfy.utils.ProgressBar``; ``made`` are all of them."""

    made: ClassVar[list["ProgressBar"]] = []

    def __init__(self, total: int):
        self.total, self.current = total, 0
        self.made.append(self)

    def update(self, value: int) -> None:
        self.current += value


def cast(kind: type[nn.Module]) -> type[nn.Module]:
    """A layer whose weights follow what they are given, as ``comfy.ops.manual_cast`` has it."""

    class Cast(kind):
        comfy_cast_weights = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            moved = {name: tensor.to(x) for name, tensor in self.named_parameters()}
            return torch.func.functional_call(_plain(self, kind), moved, (x,))

    return Cast


def _plain(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    twin = copy.copy(layer)
    twin.__class__ = kind
    return twin


@dataclasses.dataclass
class Schema:
    """``io.Schema``; ids are unique among inputs and outputs."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list = dataclasses.field(default_factory=list)
    outputs: list = dataclasses.field(default_factory=list)
    description: str = ""

    def __post_init__(self) -> None:
        ids = [port.id for port in [*self.inputs, *self.outputs] if port.id is not None]
        assert len(set(ids)) == len(ids)


class NodeOutput:
    def __init__(self, *args: Any):
        self.args = args

    @property
    def result(self) -> tuple:
        return self.args


def io_type(name: str, *more: str) -> type:
    """``io.Custom``, and ComfyUI's own types; ``more`` are what an input of it may say."""
    common = {"id", "display_name", "optional", "tooltip"} | set(more)

    class Port:
        kind = name

        def __init__(self, id: str | None = None, **said: Any):
            assert set(said) <= common, said
            self.id, self.said = id, said

    return types.SimpleNamespace(Input=Port, Output=Port)


def modules(models: Path) -> dict[str, types.ModuleType]:
    """What ``import`` finds in a ComfyUI whose models lie in this folder, on a CPU."""

    def module(name: str, **values: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        vars(made).update(values)
        return made

    numbers = ("default", "min", "max", "step")
    io = module(
        "comfy_api.latest.io",
        ComfyNode=type("ComfyNode", (), {}),
        Schema=Schema,
        NodeOutput=NodeOutput,
        Custom=io_type,
        Model=io_type("MODEL"),
        Image=io_type("IMAGE"),
        Mask=io_type("MASK"),
        Float=io_type("FLOAT", *numbers),
        Int=io_type("INT", *numbers),
        Boolean=io_type("BOOLEAN", "default"),
        String=io_type("STRING", "default", "multiline"),
        Combo=io_type("COMBO", "options", "default"),
    )
    loaded: list[Any] = []
    management = module(
        "comfy.model_management",
        get_torch_device=lambda: torch.device("cpu"),
        unet_offload_device=lambda: torch.device("cpu"),
        unet_dtype=lambda: torch.float32,
        load_models_gpu=loaded.extend,
        throw_exception_if_processing_interrupted=lambda: None,
        loaded=loaded,
    )
    layers = {name: cast(getattr(nn, name)) for name in ("Linear", "LayerNorm", "Conv2d")}
    ops = module("comfy.ops", manual_cast=types.SimpleNamespace(**layers))
    patcher = module("comfy.model_patcher", ModelPatcher=ModelPatcher)
    utils = module("comfy.utils", ProgressBar=ProgressBar)
    comfy = module(
        "comfy", model_management=management, ops=ops, model_patcher=patcher, utils=utils
    )
    paths: dict[str, str] = {}

    def listed(name: str) -> list[str]:
        folder = Path(paths[name])
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    folders = module(
        "folder_paths",
        models_dir=str(models),
        add_model_folder_path=paths.__setitem__,
        get_filename_list=listed,
        get_full_path_or_raise=lambda name, file: os.path.join(paths[name], file),
    )
    latest = module("comfy_api.latest", ComfyExtension=type("ComfyExtension", (), {}), io=io)
    return {
        "comfy": comfy,
        "comfy.model_management": management,
        "comfy.ops": ops,
        "comfy.model_patcher": patcher,
        "comfy.utils": utils,
        "comfy_api": module("comfy_api", latest=latest),
        "comfy_api.latest": latest,
        "folder_paths": folders,
    }


def load_nodes(name: str = "custom_nodes_x_fact") -> types.ModuleType:
    """The folder as ComfyUI imports it; the modules of :func:`modules` must be there."""
    spec = importlib.util.spec_from_file_location(name, NODES / "__init__.py")
    assert spec is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    assert spec.loader is not None
    spec.loader.exec_module(found)
    return found


class SpatialTransformer:
    def __init__(self, blocks: Any):
        self.transformer_blocks = blocks


class Downsample: ...


class Upsample: ...


class ComfyUNet(nn.Module):
    """diffusers' UNet with blocks that are computed in ComfyUI's order, at ComfyUI's places."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet, self.options = unet, {}
        self.input_blocks, place = [[]], {}

        def spatial(kind: str, column: list, attention: Any) -> list:
            blocks = attention.transformer_blocks
            place.update({id(b): ((kind, len(column)), k) for k, b in enumerate(blocks)})
            return [SpatialTransformer(blocks)]

        for block in unet.down_blocks:
            for i in range(len(block.resnets)):
                inner = getattr(block, "attentions", None)
                row = spatial("input", self.input_blocks, inner[i]) if inner else []
                self.input_blocks.append(row)
            if block.downsamplers:
                self.input_blocks.append([Downsample()])
        self.output_blocks: list = []
        for block in unet.up_blocks:
            for i in range(len(block.resnets)):
                inner = getattr(block, "attentions", None)
                row = spatial("output", self.output_blocks, inner[i]) if inner else []
                last = i == len(block.resnets) - 1 and block.upsamplers
                self.output_blocks.append([*row, Upsample()] if last else row)
        self.middle_block = spatial("middle", [], unet.mid_block.attentions[0])
        for _, block in text_blocks(unet):
            block.forward = _forward(self, block, *place[id(block)])

    def predict(self, x: Any, t: Any, text: Any, options: dict) -> torch.Tensor:
        """The noise; ``options`` are the transformer options of a sampler's call."""
        self.options = options | {"original_shape": list(x.shape)}
        return self.unet(x, t, encoder_hidden_states=text).sample


def _forward(owner: ComfyUNet, block: Any, place: tuple[str, int], index: int) -> Any:
    def forward(x: torch.Tensor, *args: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
        patches = owner.options.get("patches", {})
        more = {k: v for k, v in owner.options.items() if k != "patches"}
        rows, size = x.shape[0], round(x.shape[1] ** 0.5)
        more |= {"block": place, "block_index": index, "n_heads": block.attn1.heads}
        more["activations_shape"] = [rows, x.shape[2], size, x.shape[1] // size]
        x = block.attn1(block.norm1(x)) + x
        for patch in patches.get("middle_patch", ()):
            x = patch(x, more)
        n, context, value = block.norm2(x), encoder_hidden_states, encoder_hidden_states
        for patch in patches.get("attn2_patch", ()):
            n, context, value = patch(n, context, value, more)
        assert value is context
        x = block.attn2(n, encoder_hidden_states=context) + x
        return block.ff(block.norm3(x)) + x

    return forward
