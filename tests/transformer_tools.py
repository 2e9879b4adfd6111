"""Tiny random pipelines of PixArt, Stable Diffusion 3 and Flux, and of a transformer that is not known: made once."""

import copy
from typing import Any

import torch
from conftest import _text_config, _tokenizer
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

T5_WIDTH = 32
FAMILIES = ["pixart-alpha", "pixart-sigma", "sd3", "sd35", "flux"]


def make_transformer(family: str, **overrides: Any) -> Any:
    """A transformer of a family by itself."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 16}
    if family.startswith("pixart"):
        options: dict[str, Any] = heads | {
            "sample_size": 16, "num_layers": 3, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 32,
            "caption_channels": T5_WIDTH, "use_additional_conditions": False,
        }  # fmt: skip
        return PixArtTransformer2DModel(**options | overrides).eval()
    if family.startswith("sd3"):
        options = heads | {
            "sample_size": 16, "num_layers": 3, "in_channels": 4, "out_channels": 4, "joint_attention_dim": T5_WIDTH,
            "caption_projection_dim": 32, "pooled_projection_dim": 32,
        }  # fmt: skip
        if family == "sd35":
            options |= {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
        return SD3Transformer2DModel(**options | overrides).eval()
    if family == "chroma":
        options = heads | {
            "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": T5_WIDTH,
            "axes_dims_rope": (4, 6, 6), "approximator_num_channels": 64, "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        }  # fmt: skip
        return ChromaTransformer2DModel(**options | overrides).eval()
    options = heads | {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": T5_WIDTH,
        "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return FluxTransformer2DModel(**options | overrides).eval()


def _t5() -> tuple[Any, Any]:
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((letter, -2.0) for letter in " abcdefghijklmnopqrstuvwxyz"),
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(Unigram(pieces, unk_id=2)), pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=24,
    )  # fmt: skip
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(pieces), d_model=T5_WIDTH, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), tokenizer


def _vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=32,
        shift_factor=0.0,
    ).eval()  # fmt: skip


def _make(family: str) -> Any:
    t5, t5_tokenizer = _t5()
    transformer, vae = make_transformer(family), _vae()
    if family.startswith("pixart"):
        kind = PixArtSigmaPipeline if family.endswith("sigma") else PixArtAlphaPipeline
        return kind(
            tokenizer=t5_tokenizer, text_encoder=t5, vae=vae, transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(),
        )  # fmt: skip
    if family == "chroma":
        return ChromaPipeline(
            tokenizer=t5_tokenizer, text_encoder=t5, vae=vae, transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )  # fmt: skip
    tokenizer = _tokenizer()
    config = _text_config(tokenizer)
    parts = {"tokenizer": tokenizer, "vae": vae, "transformer": transformer}
    torch.manual_seed(0)
    if family == "flux":
        return FluxPipeline(
            **parts, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=CLIPTextModel(config).eval(),
            text_encoder_2=t5, tokenizer_2=t5_tokenizer,
        )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    return StableDiffusion3Pipeline(
        **parts, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=encoders[0], text_encoder_2=encoders[1],
        tokenizer_2=tokenizer, text_encoder_3=t5, tokenizer_3=t5_tokenizer,
    )  # fmt: skip


_made: dict[str, Any] = {}


def make_pipeline(family: str) -> Any:
    """A fresh copy of a family's pipeline."""
    if family not in _made:
        _made[family] = _make(family)
        _made[family].set_progress_bar_config(disable=True)
    return copy.deepcopy(_made[family])


def made_of(kind: type, family: str, **more: Any) -> Any:
    """A pipeline of another class, of a family's parts and of more."""
    pipe = kind(**make_pipeline(family).components, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_image_to_image(family: str) -> Any:
    """A family's pipeline that begins with a picture."""
    return made_of(FluxImg2ImgPipeline if family == "flux" else StableDiffusion3Img2ImgPipeline, family)


def make_controlled(family: str) -> Any:
    """A family's pipeline with a ControlNet that does something."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 16}
    if family == "flux":
        net = FluxControlNetModel(
            **heads, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        layers = [net.controlnet_x_embedder, *net.controlnet_blocks, *net.controlnet_single_blocks]
    else:
        net = SD3ControlNetModel.from_transformer(
            make_transformer(family), num_layers=1, num_extra_conditioning_channels=0,
            load_weights_from_transformer=False,
        )  # fmt: skip
        layers = [net.pos_embed_input.proj, *net.controlnet_blocks]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=0.5)  # zero as built, so that it would change nothing
    kind = FluxControlNetPipeline if family == "flux" else StableDiffusion3ControlNetPipeline
    return made_of(kind, family, controlnet=net.eval())


def generate(pipe: Any, seed: int = 0, prompt: str | list[str] = "a cat", **options: Any) -> torch.Tensor:
    """Run any of the pipelines: pixels (batch, 3, height, width)."""
    call: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 12}
    if isinstance(pipe, (PixArtAlphaPipeline, PixArtSigmaPipeline)):
        call |= {"use_resolution_binning": False, "clean_caption": False, "guidance_scale": 5.0}
    elif isinstance(pipe, StableDiffusion3Pipeline):
        call |= {"guidance_scale": 5.0}
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type="pt", **call | options).images


def call(
    model: Any,
    rows: int,
    columns: int,
    batch: int = 1,
    timestep: float = 700.0,
    dtype: Any = torch.float32,
    **more: Any,
) -> torch.Tensor:
    """Call a transformer by itself on a grid of tokens."""
    given = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=given).to(dtype)

    kind = type(getattr(model, "_orig_mod", model)).__name__
    with torch.set_grad_enabled(more.pop("gradients", False)):
        if "Flux" in kind:
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            ids = torch.stack([torch.zeros_like(y), y, x], dim=-1).flatten(0, 1).to(dtype)
            return model(
                hidden_states=random(rows * columns, 16), encoder_hidden_states=random(7, 32),
                pooled_projections=random(16), timestep=torch.full((batch,), timestep / 1000).to(dtype),
                **{"img_ids": ids, "txt_ids": torch.zeros(7, 3).to(dtype)} | more,
            ).sample  # fmt: skip
        latents, text = random(4, 2 * rows, 2 * columns), random(7, 32)
        if "PixArt" in kind:
            return model(latents, encoder_hidden_states=text, timestep=torch.full((batch,), timestep), **more).sample
        return model(
            latents, encoder_hidden_states=text, pooled_projections=random(32),
            timestep=torch.full((batch,), timestep), **more,
        ).sample  # fmt: skip
