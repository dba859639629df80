"""Where the fleet token is, and who may read it. The token itself is looked at and not kept."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from common.config import TOKEN_VARIABLE, Config, fleet_token
from common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """The token of this machine's services.

    Attributes:
        source: the variable or the file; empty: nobody named one.
        error: why it cannot be used; else empty.
        mode: of the file; None without one.
        num_letters: its length.
    """

    source: str = ""
    error: str = ""
    mode: int | None = None
    num_letters: int = 0


def gather_token(config: Config, has_variable: bool) -> TokenFacts:
    """Look for the token as the services do."""
    file = config.fleet_token_file
    if not has_variable and file is None:
        return TokenFacts()
    source = TOKEN_VARIABLE if has_variable else str(file)
    mode = None
    if not has_variable and file is not None:
        try:
            mode = stat.S_IMODE(os.stat(file).st_mode)
        except OSError:
            mode = None
    try:
        return TokenFacts(source, "", mode, len(fleet_token(config)))
    except ConfigError as error:
        return TokenFacts(source, str(error), mode)
