"""Download the files of a base from the hub, or find the cached copy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from veneer.errors import BaseError

_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*"]
_NOT = ["original/*", "onnx/*", "consolidated*", "*.bin", "*.pth"]
_JSON = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"]
_VARIANTS = ["*.fp16.*", "*.bf16.*", "*.non_ema.*", "*.ema.*"]
_UNUSED_COMPONENTS = ["safety_checker/*", "feature_extractor/*", "image_encoder/*", "vae_1_0/*"]


def hub_snapshot(
    name: str, *, searched: str, hint: str, weights: bool = True, say: Callable[[str], None] | None = None
) -> Path:
    """Return the snapshot directory of `org/name[@revision]` in the hub's cache.

    If the hub cannot be reached, the cached copy is used. Variants of an image base (fp16, EMA) are
    downloaded only if the hub has nothing else.

    weights: if False, download only the small files that identify a base.
    searched: the folders already searched, for the error.
    hint: other ways to get a base, for the error.
    say: called with a message that states the size of the download.

    Raises BaseError if the hub does not have the base, or cannot be reached and no copy is cached."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    repo, _, revision = name.partition("@")
    where = f"{searched}, and the hub {constants.ENDPOINT} (cache: {constants.HF_HUB_CACHE})"
    try:
        snapshot = snapshot_download(repo, revision=revision or None, allow_patterns=_JSON, ignore_patterns=_NOT)
        if not weights:
            return Path(snapshot)
        allow, ignore = _FILES, _NOT
        if (Path(snapshot) / "model_index.json").exists():
            # Skip single-file checkpoints and the components that generation does not need.
            allow, ignore = [*_JSON, "*/*.safetensors"], [*_NOT, *_VARIANTS, *_UNUSED_COMPONENTS]
        if say is not None:
            with suppress(Exception):  # The download itself reports the error.
                files = snapshot_download(
                    repo, revision=revision or None, allow_patterns=allow, ignore_patterns=ignore, dry_run=True
                )
                if missing := sum(file.file_size or 0 for file in files if file.will_download):
                    say(f"downloading {repo} ({missing / 1e6:,.0f} MB) from the hub")
        snapshot = snapshot_download(repo, revision=revision or None, allow_patterns=allow, ignore_patterns=ignore)
        if allow is not _FILES and not any(
            Path(snapshot).glob("*/*.safetensors")
        ):  # The repository contains only variants.
            ignore = [*_NOT, *_UNUSED_COMPONENTS]
            snapshot = snapshot_download(repo, revision=revision or None, allow_patterns=allow, ignore_patterns=ignore)
    except GatedRepoError as error:
        message = f"{repo} is gated: it requires an account that has accepted its terms"
        raise BaseError(
            message, where=where, fix=f"accept the terms on its page and run `hf auth login`. {hint}"
        ) from error
    except RevisionNotFoundError as error:
        raise BaseError(f"{repo} has no revision {revision!r}", where=where) from error
    except RepositoryNotFoundError as error:
        raise BaseError(f"there is no base {name!r}", where=where, fix=hint) from error
    except Exception as error:  # offline mode, no route, DNS, proxies: each HTTP client has its own errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"there is no base {name!r} on this machine, and the hub cannot be reached"
        raise BaseError(message, where=where, fix=f"{hint}. (The hub client said: {reason[:160]})") from error
    return Path(snapshot)
