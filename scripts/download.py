"""Downloads a model from the Hugging Face hub into `checkpoints/<org>/<name>`.

    python scripts/download.py --repo_id HuggingFaceTB/SmolLM2-360M-Instruct

It fetches the configuration, the tokenizer and the weights in one format: safetensors if there are
any, else `pytorch_model*.bin`. Files already there are not fetched again. The last line is the
folder.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

try:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints exceptions of its imports
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        from huggingface_hub.constants import ENDPOINT
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
except ValueError as error:  # it reads its environment variables on import
    names = ", ".join(sorted(name for name in os.environ if name.startswith("HF_")))
    print(f"error: huggingface_hub refuses a variable, one of {names} ({error})", file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import Parser, UserError, named, named_path
from families import FAMILIES, WRAPPERS
from files import read_json
from process import run

SMALL_FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
}

HTTP = HfHubHTTPError.__bases__[0].__module__.split(".")[0]  # requests, or httpx in newer versions
# What failing connections raise; the last one is from large-file transfers.
UNREACHABLE = (
    HfHubHTTPError.__bases__[0],
    getattr(sys.modules[HTTP], "InvalidURL", ConnectionError),
    LocalEntryNotFoundError,
    ConnectionError,
    TimeoutError,
    RuntimeError,
)


def choose_files(names: set[str]) -> set[str]:
    """The files to fetch, out of all names in a repository; empty if there are no weights.

    Subfolders are skipped: they hold other formats, such as Meta's own weights in `original`.
    """
    root = {name for name in names if "/" not in name}
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        # `consolidated` is a second copy of the weights under other names, `adapter` is a LoRA.
        weights = {
            name
            for name in root
            if fnmatch(name, pattern) and not name.startswith(("consolidated", "adapter"))
        }
        if weights:
            index = {name for name in root if fnmatch(name, f"{pattern}.index.json")}
            return weights | index | (root & SMALL_FILES)
    return set()


@contextlib.contextmanager
def explaining(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the hub and of the network into `UserError`s with a URL."""
    page = f"{ENDPOINT}/{repo_id}"
    try:
        yield
    except HFValidationError:
        message = f"{repo_id!r} is no model's name; pass org/name, as in {ENDPOINT}/<org>/<name>"
    except GatedRepoError:  # before its parent, RepositoryNotFoundError
        message = (
            f"{repo_id} is gated; visit {page}, accept the licence there, "
            "and pass --hf_token with a token of the same account"
        )
    except RepositoryNotFoundError:
        message = (
            f"the hub shows no model {repo_id}; check its name at {page}, "
            "and pass --hf_token if it is private"
        )
    except RevisionNotFoundError:
        message = f"{repo_id} has no revision {revision!r}; choose one at {page}/tree/main"
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            message = f"the hub refuses the token; make a new one at {ENDPOINT}/settings/tokens"
        else:
            message = f"the hub answered with status {status} for {page}; try again later"
    except OfflineModeIsEnabled:
        message = f"HF_HUB_OFFLINE is set, so {page} was not asked; unset it"
    except UNREACHABLE as error:
        reason = f"{error.__cause__ or error}".split("\n")[0]
        message = f"cannot reach {page} ({reason}); check the connection and run this again"
    except UnicodeEncodeError:
        message = "the token holds a character that no token has; copy it again"
    except (ValueError, ImportError) as error:  # ImportError: SOCKS needs a package
        advice = "check HF_ENDPOINT, and HTTPS_PROXY, HTTP_PROXY and ALL_PROXY"
        message = f"cannot ask {page} ({error}); {advice}"
    except OSError as error:
        advice = "check the folder" if error.filename else "check the file SSL_CERT_FILE names"
        advice = "make room" if error.errno == errno.ENOSPC else advice
        message = f"cannot fetch {repo_id} ({error}); {advice} and run this again"
    else:
        return
    raise UserError(message)


def check_space(folder: Path, sizes: dict[str, int]) -> None:
    """Raise a `UserError` if the files that are not in `folder` yet do not fit on its disk."""
    missing = sum(size for name, size in sizes.items() if not os.path.exists(folder / name))
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(
            f"{folder} needs {missing / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; "
            "make room or pass another --checkpoint_dir"
        )


def download(repo_id: str, folder: Path, revision: str | None, token: str | None) -> None:
    """Fetch the files of `repo_id` that `folder` lacks; `UserError` if that fails."""
    page = f"{ENDPOINT}/{repo_id}"
    with explaining(repo_id, revision):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, token=token)
        names = {file.rfilename for file in info.siblings or []}
        wanted = choose_files(names)
        if not wanted or "config.json" not in names:
            lack = "config.json" if wanted else "*.safetensors and no pytorch_model*.bin"
            raise UserError(f"{page} has no {lack}, so it is not a model that can be converted")
        # The listed commit, even if the branch moves on meanwhile.
        source = {"repo_id": repo_id, "revision": info.sha, "local_dir": folder, "token": token}
        config = read_json(Path(hf_hub_download(filename="config.json", **source)))
        family = config.get("model_type", "llama")
        known = [*FAMILIES, *WRAPPERS]
        if family not in known:  # fails before gigabytes are fetched in vain
            raise UserError(f"{page} is a {family} model; use one of {', '.join(known)}")
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        check_space(folder, {name: sizes[name] for name in wanted})
        snapshot_download(allow_patterns=sorted(wanted), **source)
    for name in sorted(wanted):  # the library falls back to local files when the network fails
        path = folder / name
        if not os.path.isfile(path) or sizes[name] not in (0, path.stat().st_size):
            raise UserError(f"{path} did not arrive whole from {page}; run this again")
    # A killed run leaves partial files here that the library never uses again.
    for partial in (folder / ".cache" / "huggingface" / "download").glob("*.incomplete"):
        partial.unlink()


# ------------------------------------------------------------------------------------------------
# The command line


def main(args: argparse.Namespace) -> None:
    folder = args.checkpoint_dir / args.repo_id
    download(args.repo_id, folder, args.revision, args.hf_token or None)
    print(folder)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add, default = parser.group("model"), Path("checkpoints")
    add("--repo_id", type=named, required=True, help="org/name, as in the model's URL")
    add("--hf_token", help="for gated and private models (default: $HF_TOKEN)")
    add("--revision", type=named, help="a branch, tag or commit (default: main)")
    about = "the folder of all checkpoints (default: checkpoints)"
    add("--checkpoint_dir", type=named_path, default=default, help=about)
    return parser


if __name__ == "__main__":
    run(main, make_parser())
