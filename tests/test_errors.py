"""What is secret in a URL is in no sentence."""

from __future__ import annotations

import pytest

from rlhf_tasks.errors import without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:secret@host:1/api", "http://host:1/api"),
        ("http://u:p@secret@host", "http://host"),
        ("http://u:p/secret@host", "http://host"),
        ("postgresql://host/db?password=secret", "postgresql://host/db"),
        ("see https://host/a?token=secret and //u:secret@other", "see https://host/a and //other"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
    ],
)
def test_secrets_are_left_out(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
