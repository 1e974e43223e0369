"""What a prompt says: tokens of Qwen2.5-VL [1, L, 3584] and one pooled token of CLIP [1, 768].

tokens   system sentence + PROMPT -> Qwen2.5-VL -> last hidden states from position `crop` on
pooled   PROMPT -> CLIP text model -> pooled output of its first 77 tokens
Sentences and crop positions are those of the training, misspellings included. Upstream pads the
tokens and masks the padding in every attention; leaving the padding out is the same.
"""

import html
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kandinsky_model.clip import fit
from kandinsky_model.config import CrossDiTConfig
from kandinsky_model.presets import Task
from kandinsky_model.pretrained import check_model, read_model, read_other, require

Text = tuple[Tensor, Tensor]
Content = Literal["video", "image", "image-edit"]
Variant = Literal["original", "diffusers"]

CLIP_TOKENS = 77
IMAGE_TOKEN = "<|image_pad|>"
# What a whole CLIP has beside its text model.
_CLIP_UNUSED = (
    "vision_model", "visual_projection", "text_projection", "logit_scale",
    "embeddings.position_ids", "text_model.embeddings.position_ids",
)  # fmt: skip
# What upstream guides away from.
NEGATIVE_PROMPTS: dict[Content, str] = {
    "video": "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, "
    "low quality, ugly, deformed, walking backwards",
    "image": "",
    "image-edit": "",
}

CONTENT: dict[Task, Content] = {
    "text-to-video": "video",
    "image-to-video": "video",
    "text-to-image": "image",
    "image-to-image": "image-edit",
}

logger = getLogger(__name__)


@dataclass(frozen=True)
class Template:
    """How a prompt is put to Qwen2.5-VL.

    Attributes:
        text: What it reads, with {} for the prompt.
        crop: Tokens before the prompt, whose features are dropped.
        max_tokens: Tokens that may follow, those of an image not counted; what is too much of the
            prompt is cut off.
    """

    text: str
    crop: int
    max_tokens: int


_VIDEO = (
    "<|im_start|>system\n"
    "You are a {role}. Describe the video in detail.\n"
    "Describe how the camera moves or shakes, describe the zoom and view angle, whether it "
    "follows the objects.\n"
    "Describe the location of the video, main characters or objects and their action.\n"
    "Describe the dynamism of the video and presented actions.\n"
    "Name the visual style of the video: whether it is a professional footage, user generated "
    "content, some kind of animation, video game or scren content.\n"
    "Describe the visual effects, postprocessing and transitions if they are presented in the "
    "video.\n"
    "Pay attention to the order of key actions shown in the scene.<|im_end|>\n"
    "<|im_start|>user\n{prompt}<|im_end|>"
)
_IMAGE = (
    "<|im_start|>system\n"
    "You are a {role}. Describe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{prompt}<|im_end|>"
)
_EDIT = (
    "<|im_start|>system\n"
    "You are a {role}. Based on the provided source image (first image) and target image (second "
    "image), create an interesting text prompt that can be used together with the source image to "
    "create the target image:<|im_end|>{user}{prompt}"
    f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|><|im_end|>"
)


def _template(text: str, crop: int, max_tokens: int, **names: str) -> Template:
    return Template(text.format(prompt="{}", **names), crop, max_tokens)


_PROMT, _PROMPT = "promt engineer", "prompt engineer"
# The crop is where the prompt begins; of an edit, the training dropped its first tokens too.
# Upstream cuts nothing off an edit, but its positions of text end at 1024.
TEMPLATES: dict[Variant, dict[Content, Template]] = {
    "original": {
        "video": _template(_VIDEO, 129, 256, role=_PROMT),
        "image": _template(_IMAGE, 41, 512, role=_PROMT),
        "image-edit": _template(_EDIT, 55, 1024, role=_PROMT, user="\n<|im_start|>user\n"),
    },
    "diffusers": {
        "video": _template(_VIDEO, 128, 512, role=_PROMPT),
        "image": _template(_IMAGE, 40, 512, role=_PROMPT),
        "image-edit": _template(_EDIT, 54, 1024, role=_PROMPT, user="<|im_start|>user"),
    },
}


class TextEncoder(nn.Module):
    """Qwen2.5-VL and CLIP with their tokenizers.

    Args:
        qwen: A `Qwen2_5_VLForConditionalGeneration` of transformers.
        tokenizer: Its tokenizer.
        clip: A `CLIPTextModel` of transformers.
        clip_tokenizer: Its tokenizer.
        image_processor: Cuts an image into patches for `qwen`; for image editing only.
        variant: Whose templates: upstream's, or those of the pipelines in diffusers.
    """

    def __init__(
        self,
        qwen: Any,
        tokenizer: Any,
        clip: Any,
        clip_tokenizer: Any,
        *,
        image_processor: Any = None,
        variant: Variant = "original",
    ) -> None:
        _check_variant(variant)
        super().__init__()
        self.qwen, self.clip = qwen.model.eval(), clip.eval()  # the head that predicts words: no
        self.tokenizer, self.clip_tokenizer = tokenizer, clip_tokenizer
        self.image_processor = image_processor
        self.variant: Variant = variant

    @classmethod
    def load(
        cls,
        qwen: Path,
        tokenizer: Path,
        clip: Path,
        clip_tokenizer: Path,
        *,
        images: bool = False,
        variant: Variant = "original",
    ) -> "TextEncoder":
        """Read everything from local folders, in the dtypes it is stored in.

        Args:
            qwen: Folder of the weights and the config of Qwen2.5-VL.
            tokenizer: Folder of its tokenizer and image processor.
            clip: Folder of the weights and the config of CLIP, with or without its image half.
            clip_tokenizer: Folder of its tokenizer.
            images: Whether prompts will come with an image to edit.
            variant: See `TextEncoder`.
        """
        library = require("transformers")
        processor = library.AutoImageProcessor
        return cls(
            read_model(library.Qwen2_5_VLForConditionalGeneration, qwen, dtype="auto"),
            read_other(library.AutoTokenizer, tokenizer),
            read_model(library.CLIPTextModel, clip, ignore=_CLIP_UNUSED, dtype="auto"),
            read_other(library.AutoTokenizer, clip_tokenizer),
            image_processor=read_other(processor, tokenizer, backend="pil") if images else None,
            variant=variant,
        )

    @staticmethod
    def check(
        qwen: Path,
        tokenizer: Path,
        clip: Path,
        clip_tokenizer: Path,
        config: CrossDiTConfig,
        *,
        images: bool = False,
        variant: Variant = "original",
    ) -> None:
        """Raise the error that `load` would raise, or the model of `config` on its features.

        Reads the tokenizers, and of the weights nothing but headers. The arguments are those of
        `load`.
        """
        _check_variant(variant)
        library = require("transformers")
        parts = (
            (library.Qwen2_5_VLForConditionalGeneration, qwen, (), tokenizer, config.in_text_dim),
            (library.CLIPTextModel, clip, _CLIP_UNUSED, clip_tokenizer, config.in_text_dim2),
        )
        for kind, folder, unused, words, channels in parts:
            found = check_model(kind, folder, ignore=unused).config.get_text_config()
            if found.hidden_size != channels:
                raise ValueError(
                    f"{folder} gives features of {found.hidden_size} channels, where the model "
                    f"takes {channels}"
                )
            reader = read_other(library.AutoTokenizer, words)
            if (size := len(reader)) > found.vocab_size:
                raise ValueError(
                    f"the tokenizer in {words} knows {size} tokens, and {folder} "
                    f"{found.vocab_size}: they do not belong together"
                )
            try:
                reader("a cat")
            except Exception as error:  # tokenizers raises nothing more special
                raise ValueError(f"the tokenizer in {words} reads no text: {error}") from error
        if images:
            read_other(library.AutoImageProcessor, tokenizer, backend="pil")

    @property
    def blocks(self) -> list[nn.Module]:
        """What can come to a device one after the other, in the order of the calls."""
        text = self.qwen.language_model
        return [text.embed_tokens, self.qwen.visual, *text.layers]

    @property
    def device(self) -> torch.device:
        """Where the features are computed."""
        return next(self.clip.parameters()).device

    @torch.no_grad()
    def forward(self, prompt: str, content: Content, image: Tensor | None = None) -> Text:
        """Encode one prompt.

        Args:
            prompt: Any text; too long a text is cut off, with a warning.
            content: What the prompt describes.
            image: The image to edit, uint8 [H, W, 3]; for "image-edit" only.

        Returns:
            Features [1, L, in_text_dim] and pooled features [1, in_text_dim2].
        """
        if self.variant == "diffusers":
            prompt = " ".join(html.unescape(html.unescape(prompt)).split())
        return self._tokens(prompt, content, image), self._pooled(prompt)

    def _tokens(self, prompt: str, content: Content, image: Tensor | None) -> Tensor:
        template = TEMPLATES[self.variant][content]
        text, vision = template.text, {}
        if content == "image-edit":
            if image is None or self.image_processor is None:
                raise ValueError("content 'image-edit' needs an image and an image_processor")
            vision = self._patches(image)
            tokens = int(vision["image_grid_thw"].prod()) // self.image_processor.merge_size**2
            text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * tokens)
        ids = self._ids(text.replace("{}", prompt))
        # An image follows the prompt, from a special token on: its end is the end of all.
        end = len(self._ids(text.split("{}")[1])) if vision else 0
        first, last = template.crop + template.max_tokens, len(ids) - end
        if last > first:
            lost = self.tokenizer.decode(ids[first:last], skip_special_tokens=True)
            logger.warning("the prompt is too long; nobody will read its end: %s", lost)
            ids = torch.cat([ids[:first], ids[last:]])
        ids = ids[None].to(self.device)
        if vision:
            is_image = ids == self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
            vision["mm_token_type_ids"] = is_image.int()
        states = self.qwen(ids, use_cache=False, **vision).last_hidden_state
        return states[:, template.crop :]

    def _ids(self, text: str) -> Tensor:
        return self.tokenizer(text, return_tensors="pt")["input_ids"][0]

    def _patches(self, image: Tensor) -> dict[str, Tensor]:
        """Patches of the image at half its size, as upstream shows it to Qwen2.5-VL."""
        height, width = image.shape[0] // 2, image.shape[1] // 2
        half = fit(image[None], height, width)[0]
        patches = self.image_processor(images=[half.numpy()], return_tensors="pt")
        return {name: value.to(self.device) for name, value in patches.items()}

    def _pooled(self, prompt: str) -> Tensor:
        tokens = self.clip_tokenizer(
            [prompt], max_length=CLIP_TOKENS, truncation=True, padding="max_length",
            return_tensors="pt",
        )  # fmt: skip
        inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return self.clip(**inputs).pooler_output


def _check_variant(variant: str) -> None:
    if variant not in TEMPLATES:
        raise ValueError(f"variant {variant!r} is none of {', '.join(TEMPLATES)}")
