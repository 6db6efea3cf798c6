"""Tells within seconds that a download cannot work, instead of hanging on a dead network."""

import threading
import urllib.error
import urllib.request


def why_unreachable(url: str, timeout: float = 8.0) -> str | None:
    """None if the host of url answers, else the reason in words.

    timeout: seconds for everything, name resolution included (which no socket timeout covers).
    Any HTTP answer counts, also an error status: the download itself will tell more.
    """
    reason: list[str | None] = [f"no answer within {timeout:g} s"]

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "finetune"})
        try:
            urllib.request.urlopen(request, timeout=timeout).close()
            reason[0] = None
        except urllib.error.HTTPError:
            reason[0] = None
        except (OSError, ValueError) as error:
            reason[0] = str(getattr(error, "reason", error))

    # daemon: a name server that never answers must not keep the process alive
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return reason[0]
