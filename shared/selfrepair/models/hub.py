"""Whether the Hugging Face hub answers: asked with its own client, for seconds instead of minutes."""

from __future__ import annotations

import threading
from dataclasses import dataclass

#: Seconds that the hub has to answer, name resolution included.
HUB_TIMEOUT = 3.0


@dataclass(frozen=True)
class Answer:
    """The HTTP ``status`` of an address of the hub; ``None``: no answer, and ``why`` says so."""

    status: int | None
    why: str = ""


def ask_hub(url: str) -> Answer:
    """What the hub says of ``url``; it is not asked where ``HF_HUB_OFFLINE`` is set."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return Answer(None, "HF_HUB_OFFLINE is set")
    status = _status(url)
    if isinstance(status, int):
        return Answer(status)
    of = "" if status is None else f" ({type(status).__name__})"
    return Answer(None, f"no answer from {url.split('/resolve/')[0]}{of}")


def _status(url: str) -> int | Exception | None:
    """HTTP status of a HEAD request with the hub's own client, proxies and token.

    Without an answer, what the client raised; ``None`` if it took too long.
    """
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError

    answer: list[int | Exception] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(url, timeout=HUB_TIMEOUT)
            answer.append(200)
        except HfHubHTTPError as error:
            answer.append(error.response.status_code)
        except Exception as error:  # whatever the client raises when there is no connection
            answer.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # a resolver of names obeys no timeout
    asking.start()
    asking.join(HUB_TIMEOUT)
    return answer[0] if answer else None
