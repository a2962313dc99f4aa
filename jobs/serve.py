"""The trained discriminator behind an HTTP endpoint.

    python jobs/serve.py --checkpoint runs/tiny/align/discriminator
    python jobs/serve.py --new-token                                    a token for callers, and its digest for here
    PRISM_SERVE_TOKENS=DIGEST python jobs/serve.py --checkpoint FOLDER host=0.0.0.0 port=9000 replicas.most=4

Prints where it listens and where its API is documented, and serves until Ctrl-C. On a cluster deploy the same
application with `serve deploy configs/serve.yaml`. Exit code 1: it failed (the last line says why); 2: bad
configuration or input, a port that is taken among it; 130: stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import sys

from prism_ray.config.serve import ServeJobSettings
from prism_ray.runtime.front_door import finish, refusing, settings_for

NEW_TOKEN, CHECKPOINT = "--new-token", "--checkpoint"


def main(argv: list[str]) -> int:
    """Run the job; returns its exit code."""
    if NEW_TOKEN in argv:
        return _print_token()
    settings = settings_for(_with_checkpoint(argv), ServeJobSettings, __doc__ or "")
    return finish(lambda: _serve(settings), "stopped")


def _serve(settings: ServeJobSettings) -> None:
    # Imported after the command line is understood: --help and a typing error should not take torch's seconds.
    from prism_ray.runtime.cluster import ClusterError
    from prism_ray.serve.local import StartError, serve_until_stopped

    with refusing(StartError, ClusterError):
        serve_until_stopped(settings)
    raise KeyboardInterrupt  # nothing else ends it


def _with_checkpoint(argv: list[str]) -> list[str]:
    """`--checkpoint FOLDER` as the setting that it is."""
    words = list(argv)
    for index, word in enumerate(words):
        if word == CHECKPOINT and index + 1 < len(words):
            words[index : index + 2] = [f"checkpoint={words[index + 1]}"]
        elif word.startswith(CHECKPOINT + "="):
            words[index] = word.removeprefix("--")
    return words


def _print_token() -> int:
    from prism_ray.serve.auth import new_token

    token, digest = new_token()
    print(f"token   {token}    (give it to who may ask; it is stored nowhere)")
    print(f"digest  {digest}    (into PRISM_SERVE_TOKENS or the file of tokens.file)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
