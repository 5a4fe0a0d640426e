"""The error tree. Every error a person can meet is one of these; anything else is a bug.

FtjobError                      message: what, which one, why · hint: the next thing to try
├── BadInput                    what a person wrote or named cannot be used; exit 2, nothing was created
│   ├── RecipeInvalid           the recipe: key and bound
│   ├── DatasetInvalid          the dataset: file and line
│   ├── ModelInvalid            the base model: missing, unreadable, not safetensors
│   ├── RunExists / RunUnknown  the run id
│   └── IdentityMismatch        a resume that would not be the same run: names what differs
├── StorageError                a store refused or failed
│   ├── NotFound
│   ├── AlreadyExists           a create-only put found other bytes under the key
│   ├── AccessRefused           credentials or permissions; trying again will not help
│   └── Unreachable             network, throttling, full disk: trying again may help
│       └── Garbled             what answered is no store: a login page, or another server's endpoint
├── Damaged                     stored bytes do not match their digest, or are missing
└── TrainingFailed              the training itself cannot go on
"""

from __future__ import annotations


class FtjobError(Exception):
    """Root of the tree.

    Args:
        message: what went wrong, with which object, and why; one sentence.
        hint: the next thing to try; empty when there is nothing sensible to say.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class BadInput(FtjobError):
    """What a person wrote or named cannot be used. Exit code 2."""


class RecipeInvalid(BadInput):
    """The recipe is not one."""


class DatasetInvalid(BadInput):
    """The dataset cannot be trained on."""


class ModelInvalid(BadInput):
    """The base model is missing or cannot be loaded."""


class RunExists(BadInput):
    """A new run was asked for under an id that is taken."""


class RunUnknown(BadInput):
    """No run has this id."""


class IdentityMismatch(BadInput):
    """A checkpoint was made by something this attempt is not; resuming would not be the same run."""


class StorageError(FtjobError):
    """A store refused or failed."""


class NotFound(StorageError):
    """The key does not exist."""


class AlreadyExists(StorageError):
    """A create-only put found other bytes under the key."""


class AccessRefused(StorageError):
    """Credentials or permissions; trying again will not help."""


class Unreachable(StorageError):
    """Network, throttling or a full disk; trying again may help."""


class Garbled(Unreachable):
    """What answered is no store: a network's login page, which goes away, or another server, which does not."""


class Damaged(FtjobError):
    """Stored bytes do not match their digest, or are missing."""


class TrainingFailed(FtjobError):
    """The training itself cannot go on."""
