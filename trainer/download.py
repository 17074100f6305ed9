"""Whether the Hugging Face hub can be asked for a model or data set: one question with a time limit.

Without network, the libraries that download from the hub try again for up to a minute before they look at what they
fetched earlier, or fail. The answer here comes first, within seconds, and decides where they look.
"""

from __future__ import annotations

from typing import Literal

ANSWERS_WITHIN = 5.0  # seconds, for connecting and for the answer each
WITHOUT_HUB = (
    "give the path of a folder, or mend the network, a proxy or HF_ENDPOINT; with HF_HUB_OFFLINE=1 only what was "
    "downloaded before is looked at"
)


def why_unreachable(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Return why the hub cannot be asked; None where it answers, whatever it says of this name."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # The client library is httpx until huggingface_hub 2, then httpx2: the base of the hub's own error is that of both.
    http_error: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=ANSWERS_WITHIN)
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except (HfHubHTTPError, ValueError):
        return None  # the download says what is wrong with the name, or who may read it
    except http_error as error:
        if type(error).__name__ == "ReadTimeout":
            return None  # connected: a slow answer is the download's to wait for
        return f"the hub {constants.ENDPOINT} cannot be reached ({error or type(error).__name__})"
    return None
