"""The contract of the zoo: every system is a Tokenizer, and what it makes of images are Tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from zoo.errors import NotThere, ZooError, nearest, one_line, shortened
from zoo.files import expect_file, writing
from zoo.hub import HubModel


@dataclass(frozen=True)
class TokenizerInfo:
    """What a caller has to know about a tokenizer before using it."""

    system: str
    """Folder of the system under zoo/tokenizers."""
    paper: str
    image_size: int
    """Side in pixels of the square images it was made for."""
    size_multiple: int | None
    """Other heights and widths are taken when they are multiples of this; None: image_size only."""
    channels: int
    kind: str
    """"discrete" (Tokens.ids) or "continuous" (Tokens.latents)."""
    streams: tuple[str, ...]
    max_tokens: int
    """Positions per stream for an image of image_size."""
    decoded: tuple[str, ...] = ()
    """Streams that decode reads, where that is not all of them."""
    codebook_sizes: Mapping[str, int] = field(default_factory=dict)
    """Codes in the codebook of each discrete stream."""
    levels: Mapping[str, int] = field(default_factory=dict)
    """Ids per position of a residual stream: Tokens.ids is (B, N, levels); absent: (B, N)."""
    latent_dims: Mapping[str, int] = field(default_factory=dict)
    """Width of the latents of each continuous stream."""
    embedding_dim: int | None = None
    """Width of what `embed` gives; None: it is not available."""
    variable_length: bool = False
    decodes_to: str = "pixels"
    """"pixels", "depth" or "embedding"."""
    name: str = "custom"
    licence: str = "Apache-2.0"
    """Licence of the weights behind the name, as their authors state it."""

    @property
    def input(self) -> str:
        """Field of a batch that this tokenizer reads: "depth" or "image"."""
        return "depth" if self.decodes_to == "depth" else "image"


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch of B images with up to N positions each.

    ids: {stream: (B, N) or (B, N, levels) int64}; latents: {stream: (B, N, D) float}; mask: (B, N) bool, True where
    a token is live (default: everywhere); grid: (rows, columns) when the N tokens are a raster, else None.
    Raises ZooError when the shapes do not belong together.
    """

    ids: Mapping[str, Tensor] = field(default_factory=dict)
    latents: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    grid: tuple[int, int] | None = None

    def __post_init__(self):
        for kind, streams in (("ids", self.ids), ("latents", self.latents)):
            if not isinstance(streams, Mapping):
                raise ZooError(f"{kind} of Tokens are {{stream: tensor}}, got {type(streams).__name__}.")
        tensors = [*self.ids.items(), *self.latents.items()]
        if not tensors:
            raise ZooError("Tokens need at least one stream of ids or latents, got none.")
        for name, tensor in [*tensors, *([] if self.mask is None else [("mask", self.mask)])]:
            if not isinstance(tensor, Tensor) or not is_plain(tensor):
                what = f"{tensor.layout} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ZooError(f"'{name}' of Tokens must be a dense tensor, got {what}.")
            if tensor.numel() >= 2**31:  # also what a mask would take
                raise ZooError(f"'{name}' of Tokens has 2^31 values or more, {tuple(tensor.shape)}; use less at once.")
        for name, ids in self.ids.items():
            if ids.dtype != torch.int64:
                raise ZooError(f"ids of stream '{name}' must be int64, got {ids.dtype}; use ids.long().")
        for name, latents in self.latents.items():
            if latents.ndim != 3 or not latents.is_floating_point():
                raise ZooError(
                    f"latents of stream '{name}' must be float (B, N, D), got {latents.dtype} {tuple(latents.shape)}."
                )
        first, tensor = tensors[0]
        if tensor.ndim < 2:
            raise ZooError(f"stream '{first}' must be (B, N, ...), got shape {tuple(tensor.shape)}.")
        if self.mask is None:
            mask = torch.ones(tensor.shape[:2], dtype=torch.bool, device=tensor.device)
            object.__setattr__(self, "mask", mask)
        for name, other in [*tensors, ("mask", self.mask)]:
            if other.ndim < 2 or other.ndim > 3 or other.shape[:2] != tensor.shape[:2]:
                raise ZooError(
                    f"all streams and the mask must share (B, N): '{first}' has shape {tuple(tensor.shape)} "
                    f"and '{name}' has {tuple(other.shape)}."
                )
        if self.mask.dtype != torch.bool or self.mask.ndim != 2:
            raise ZooError(f"mask must be bool (B, N), got {self.mask.dtype} {tuple(self.mask.shape)}.")
        if self.grid is not None:
            if not (isinstance(self.grid, (tuple, list)) and [type(n) for n in self.grid] == [int, int]):
                raise ZooError(f"a grid is two integers (rows, columns), got {self.grid!r}.")
            if min(self.grid) < 0 or math.prod(self.grid) != tensor.shape[1]:
                raise ZooError(f"a grid of {self.grid} has {math.prod(self.grid)} places for {tensor.shape[1]} tokens.")

    def __len__(self) -> int:
        """B, the number of images."""
        return len(self.mask)

    def __getitem__(self, index) -> Tokens:
        """Tokens of some images: an int (a batch of one), a slice, a list or a tensor over the batch."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"image {index} of a batch of {len(self)}")
            index = [index]
        return self._map(lambda tensor: tensor[index])

    @staticmethod
    def cat(tokens: Sequence[Tokens]) -> Tokens:
        """Several batches as one. Raises ZooError when they are not of one form."""
        first, forms = tokens[0], set()
        for one in tokens:
            streams = one.ids | one.latents
            forms.add((one.grid, *((name, *tensor.shape[1:]) for name, tensor in streams.items())))
        if len(forms) > 1:
            raise ZooError(f"only Tokens of one form are one batch, got grids and streams {sorted(map(str, forms))}.")
        return Tokens(
            {name: torch.cat([one.ids[name] for one in tokens]) for name in first.ids},
            {name: torch.cat([one.latents[name] for one in tokens]) for name in first.latents},
            torch.cat([one.mask for one in tokens]),
            first.grid,
        )

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: live tokens of each image."""
        return self.mask.sum(1)

    def to(self, *args, **kwargs) -> Tokens:
        """As Tensor.to; a dtype changes the latents only."""
        ids_kwargs = {k: v for k, v in kwargs.items() if k != "dtype"}
        ids_args = [a for a in args if not isinstance(a, torch.dtype)]
        return Tokens(
            {name: tensor.to(*ids_args, **ids_kwargs) for name, tensor in self.ids.items()},
            {name: tensor.to(*args, **kwargs) for name, tensor in self.latents.items()},
            self.mask.to(*ids_args, **ids_kwargs),
            self.grid,
        )

    def cpu(self) -> Tokens:
        return self.to("cpu")

    def pin_memory(self) -> Tokens:
        """In page-locked memory, as a DataLoader(pin_memory=True) asks for."""
        return self._map(Tensor.pin_memory)

    def save(self, path) -> None:
        """Write to a safetensors file that Tokens.load reads."""
        tensors = {f"ids/{name}": tensor for name, tensor in self.ids.items()}
        tensors |= {f"latents/{name}": tensor for name, tensor in self.latents.items()}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in (tensors | {"mask": self.mask}).items()}
        with writing(path) as file:
            file.write(serialize(tensors, {"tokens": json.dumps({"grid": self.grid})}))

    @staticmethod
    def load(path) -> Tokens:
        """Read what save wrote. Raises ZooError for any other file."""
        path, streams = expect_file(path, "file of tokens"), {"ids": {}, "latents": {}}
        try:
            with safe_open(path, "pt") as file:
                grid = json.loads(file.metadata()["tokens"])["grid"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            mask = tensors.pop("mask")
            for name, tensor in tensors.items():
                kind, stream = name.split("/", 1)
                streams[kind][stream] = tensor
            grid = tuple(grid) if grid else None
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ZooError(f"{path} is not a file written by Tokens.save ({reason}).") from error
        return Tokens(**streams, mask=mask, grid=grid)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        return Tokens(
            {name: function(tensor) for name, tensor in self.ids.items()},
            {name: function(tensor) for name, tensor in self.latents.items()},
            function(self.mask),
            self.grid,
        )


@dataclass(frozen=True)
class Weights:
    """Where the pretrained weights of a preset are.

    location: a file in checkpoints/, or "hf://owner/name/file", of a certain commit "hf://owner/name@commit/file"; None
    when no program can fetch them, and then `manual` says which file a person has to get, and where.
    sha256: of the file, in hexadecimal, checked before it is read.
    """

    location: str | None = None
    sha256: str | None = None
    manual: str = ""


@dataclass(frozen=True)
class Preset:
    """A name of the zoo: which class, with which configuration, from which weights."""

    tokenizer: type[Tokenizer]
    config: Any
    description: str
    weights: Weights | None = None
    licence: str = "Apache-2.0"


class ImageReader(HubModel, nn.Module):
    """Base of what reads images: a configuration, an `info`, and the check of images that comes before all else.

    Images are float (B, C, H, W) in [0, 1]; each reader normalises for itself.
    """

    Config: type
    """Frozen dataclass of the sizes of the system."""
    info: Any
    """Has name, channels, image_size and size_multiple, as TokenizerInfo."""
    image_dtype: torch.dtype | None = None
    """Of the images that it is given after their check; None: that of its weights."""
    max_scale: float = 8.0
    """The largest image that is taken has the area of a square of max_scale x image_size, so that a mistake does not
    fill the memory; set it higher, on the object, for larger ones."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def max_pixels(self) -> int:
        """Height x width of the largest image that is taken."""
        return int((self.max_scale * self.info.image_size) ** 2)

    def check_images(self, images: Tensor) -> Tensor:
        """The images on the reader's device and in image_dtype; ZooError when they are not what it takes."""
        info = self.info
        want = f"{info.name} takes float images (B, {info.channels}, H, W) in [0, 1]"
        if not isinstance(images, Tensor):
            raise ZooError(f"{want}, got {type(images).__name__}; make a tensor of it first.")
        if not is_plain(images):
            raise ZooError(f"{want}, got a {images.layout} tensor on {images.device}; make it dense first.")
        if not images.is_floating_point() or images.itemsize < 2:
            raise ZooError(f"{want}, got {images.dtype}; for bytes use images.float() / 255.")
        if images.ndim != 4 or images.shape[1] != info.channels or 0 in images.shape:
            raise ZooError(f"{want}, got shape {tuple(images.shape)}.")
        height, width = images.shape[-2:]
        self.check_size(height, width, want)
        if height * width > self.max_pixels:
            most = f"of up to {self.max_pixels} pixels"
            raise ZooError(f"{want} {most}, got {height} x {width}; resize, cut it up, or set max_scale.")
        if images.numel() >= 2**31:  # which many kernels of torch cannot count
            raise ZooError(f"{want}, fewer than 2^31 values in all, got shape {tuple(images.shape)}; split the batch.")
        low, high = (bound.item() for bound in torch.aminmax(images))
        if not (low >= 0 and high <= 1):  # false for NaN too
            raise ZooError(f"{want}, got values from {low:.4g} to {high:.4g}; rescale or clamp them.")
        return images.to(self.device, self.image_dtype or self.dtype)

    def check_size(self, height: int, width: int, want: str) -> None:
        """Raise ZooError, a sentence that begins with `want`, for images of a size that is not taken."""
        size, multiple = self.info.image_size, self.info.size_multiple
        if multiple is None and (height, width) != (size, size):
            raise ZooError(f"{want} of {size} x {size} pixels, got {height} x {width}; resize.")
        if multiple and (height % multiple or width % multiple):
            raise ZooError(f"{want} whose sides are multiples of {multiple}, got {height} x {width}; resize or crop.")

    @torch.no_grad()
    def features(self, images: Tensor, **settings) -> Tensor:
        """Images (B, C, H, W) in [0, 1] to features (B, N, D) for understanding, where the system has them."""
        return self._features(self.check_images(images), **settings)

    def _features(self, images: Tensor) -> Tensor:
        raise NotThere(f"{self.info.name} has no features for understanding; it encodes and decodes only.")

    @torch.no_grad()
    def encode_image(self, images: Tensor, **settings) -> Tensor:
        """Images (B, C, H, W) in [0, 1] to embeddings (B, D), L2-normalised, where the system has a text side."""
        return F.normalize(self._encode_image(self.check_images(images), **settings), dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """K texts to embeddings (K, D) in the space of encode_image, L2-normalised.

        Raises ZooError for what is no list of texts, or a text that is too long.
        """
        return F.normalize(self._encode_text(self.check_texts(texts)), dim=-1)

    @torch.no_grad()
    def similarity(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """`logits` (B, K) of images (B, C, H, W) in [0, 1] and K texts."""
        return self.logits(self.encode_image(images), self.encode_text(texts))

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """How well embeddings (B, D) and (K, D) fit, (B, K): their cosine, where a system has not learned a scale."""
        return images @ texts.T

    def _encode_image(self, images: Tensor) -> Tensor:
        raise NotThere(f"{self.info.name} has no text side; its images have no embedding to compare with texts.")

    def _encode_text(self, texts: Sequence[str]) -> Tensor:
        raise NotThere(f"{self.info.name} has no text side; it reads images only.")

    def check_texts(self, texts: Sequence[str]) -> Sequence[str]:
        """The texts; ZooError when they are no list of at least one."""
        listed = isinstance(texts, Sequence) and not isinstance(texts, str)
        if not (listed and texts and all(isinstance(text, str) for text in texts)):
            raise ZooError(f"{self.info.name} takes a list of at least one text, got {shortened(texts)}.")
        return texts

    def extra_repr(self) -> str:
        return f"name={self.info.name!r}"


class Tokenizer(ImageReader, pipeline_tag="image-feature-extraction"):
    """Base of all tokenizers. A system sets `info` and writes `_encode`, `_decode` and, if it has them, `_features`,
    and `_encode_image` and `_encode_text`, which give embeddings before they are normalised.

    `encode`, `decode`, `reconstruct`, `embed`, `features` and what has to do with texts are the public, checked and
    gradient-free side; training goes through the system's own forward.
    """

    info: TokenizerInfo

    @torch.no_grad()
    def encode(self, images: Tensor, **settings) -> Tokens:
        """Images (B, C, H, W) in [0, 1] to Tokens. Raises ZooError for images of the wrong form."""
        return self._encode(self.check_images(images), **settings)

    @torch.no_grad()
    def decode(self, tokens: Tokens, **settings) -> Tensor:
        """Tokens to images (B, C, H, W) in [0, 1], or to the embeddings that info.decodes_to says.

        Raises ZooError for tokens that are not this tokenizer's.
        """
        decoded = self._decode(self.check_tokens(tokens), **settings)
        return decoded if self.info.decodes_to == "embedding" else decoded.clamp(0, 1)

    def reconstruct(self, images: Tensor, **settings) -> Tensor:
        """decode(encode(images, **settings))."""
        return self.decode(self.encode(images, **settings))

    @torch.no_grad()
    def embed(self, tokens: Tokens) -> Tensor:
        """Ids of all streams to codebook embeddings (B, N, info.embedding_dim): the vectors that the ids stand for.

        Those of several streams stand side by side, those of the levels of a stream are summed. Positions that are not
        live have some vector, too. Raises ZooError for tokens that are not this tokenizer's, or of latents.
        """
        if self.info.embedding_dim is None:
            raise ZooError(f"{self.info.name} has {self.info.kind} tokens and no codebook embeddings.")
        return self._embed(self.check_tokens(tokens, self.info.streams))

    def _embed(self, tokens: Tokens) -> Tensor:
        """As written here, for a tokenizer with a `quantizer` and one stream."""
        return self.quantizer.codes(tokens.ids[self.info.streams[0]])

    def _encode(self, images: Tensor) -> Tokens:
        raise NotImplementedError

    def _decode(self, tokens: Tokens) -> Tensor:
        raise NotImplementedError

    def check_tokens(self, tokens: Tokens, streams: Sequence[str] | None = None) -> Tokens:
        """The tokens on the tokenizer's device; ZooError when a stream that is needed is missing, or one does not fit.

        streams: those needed; None: what decode reads.
        """
        info = self.info
        if not isinstance(tokens, Tokens):
            raise ZooError(f"{info.name} decodes Tokens, got {type(tokens).__name__}; use Tokens(ids={{...}}).")
        what, other = ("ids", "latents") if info.kind == "discrete" else ("latents", "ids")
        given = getattr(tokens, what)
        if getattr(tokens, other):
            raise ZooError(f"{info.name} has {what} alone, got {other} of {sorted(getattr(tokens, other))}, too.")
        if 0 in (shape := tuple(tokens.mask.shape)):
            raise ZooError(f"{info.name} takes at least one token of one image, got (B, N) of {shape}.")
        if shape[1] > (most := int(self.max_scale**2 * info.max_tokens)):
            raise ZooError(f"{info.name} takes up to {most} tokens of an image, got {shape[1]}; or set max_scale.")
        if not (info.variable_length or tokens.mask.all()):
            dead = (~tokens.mask).sum().item()
            raise ZooError(f"every token of {info.name} is live, got a mask without {dead} of {tokens.mask.numel()}.")
        for name in info.decoded or info.streams if streams is None else streams:
            if name not in given:
                raise ZooError(f"{info.name} needs {what} of stream '{name}', got streams {sorted(given) or 'none'}.")
        for name in given:
            if name not in info.streams:
                raise ZooError(f"{info.name} has streams {', '.join(info.streams)}, got {what} of '{name}'.")
        for name in given if info.kind == "discrete" else ():
            ids, levels, size = tokens.ids[name], info.levels.get(name), info.codebook_sizes[name]
            if ids.ndim != (3 if levels else 2) or (levels and not 1 <= ids.shape[2] <= levels):
                shape = f"(B, N, up to {levels})" if levels else "(B, N)"
                raise ZooError(f"ids of stream '{name}' of {info.name} are {shape}, got shape {tuple(ids.shape)}.")
            if ids.numel():
                low, high = (bound.item() for bound in torch.aminmax(ids))
                if low < 0 or high >= size:
                    raise ZooError(
                        f"ids of stream '{name}' of {info.name} are 0..{size - 1}, got values from {low} to {high}."
                    )
        for name, width in info.latent_dims.items():
            if tokens.latents[name].shape[2] != width:
                raise ZooError(
                    f"latents of stream '{name}' of {info.name} are (B, N, {width}), "
                    f"got shape {tuple(tokens.latents[name].shape)}."
                )
            if not tokens.latents[name].isfinite().all():
                raise ZooError(f"latents of stream '{name}' of {info.name} are numbers, got NaN or infinite ones.")
        return tokens.to(self.device)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has its values one by one: not sparse, nested, quantised, or without any (meta)."""
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)


def raster(count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of a map of `count` tokens: its grid, or without one a square. Raises ZooError."""
    rows, columns = grid or (math.isqrt(count),) * 2
    if rows * columns != count:
        raise ZooError(f"{count} tokens are no square map; say their rows and columns in Tokens.grid.")
    return rows, columns


def config_fields(config) -> dict[str, Any]:
    """Fields of a configuration by name; one that is a configuration itself becomes a dict that also says its class."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {
        name: {"class": type(value).__name__} | config_fields(value) if is_dataclass(value) else value
        for name, value in values.items()
    }


def make_config(config, overrides: Mapping[str, Any]):
    """A copy of a configuration with some fields replaced.

    Raises ZooError for a field it does not have, a value of another type, and whatever the configuration refuses.
    """
    known = {f.name: getattr(config, f.name) for f in fields(config)}
    values = {}
    for name, value in overrides.items():
        if name not in known:
            raise ZooError(f"{type(config).__name__} has no field '{name}'{nearest(name, known)}")
        kind = type(known[name])
        if is_dataclass(kind) and isinstance(value, Mapping):
            if (given := value.get("class", kind.__name__)) != kind.__name__:
                owner = type(config).__name__
                raise ZooError(f"{owner}.{name} is a {kind.__name__} here, got a {given}; choose a name made on that.")
            value = make_config(known[name], {key: one for key, one in value.items() if key != "class"})
        elif kind is tuple and isinstance(value, Sequence) and not isinstance(value, str):
            inner = {type(one) for one in known[name]}
            value = tuple(float(one) if inner == {float} and type(one) is int else one for one in value)
            if len(inner) == 1 and any(type(one) not in inner for one in value):
                names = inner.pop().__name__
                raise ZooError(f"{type(config).__name__}.{name} holds {names} alone, got {shortened(list(value))}.")
        elif kind is float and type(value) is int:
            value = float(value)
        if kind is not type(None) and type(value) is not kind:
            raise ZooError(f"{type(config).__name__}.{name} must be of type {kind.__name__}, got {shortened(value)}.")
        values[name] = value
    return replace(config, **values)
