"""What can go wrong with the record, as a user sees it.

* RegistryError         catch this to catch them all
  x BadRule             a rule of `gate` in params.yaml cannot be read
  x GateFailed          the version does not meet the gate; every failure is in the message
  x Moved               an alias is not where the caller expected it
  x NotBuilt            a bundle, an evaluation or dvc.lock is missing: run the pipeline first
  x NotPublished        no such model, version or alias in the registry
  x RolledBack          the version, or another with its bytes, was rolled back before
  x SmokeFailed         the version could not be loaded and asked in a clean process
  x Unreachable         the tracking server does not answer
  x Unverified          bytes or lineage differ from what was recorded
"""


class RegistryError(Exception):
    """An error of the record that a user can cure."""


class BadRule(RegistryError):
    """A rule of the gate cannot be read."""


class GateFailed(RegistryError):
    """A version does not meet the gate."""


class Moved(RegistryError):
    """An alias is not where the caller expected it."""


class NotBuilt(RegistryError):
    """What should be published is not there."""


class NotPublished(RegistryError):
    """The registry holds no such model, version or alias."""


class RolledBack(RegistryError):
    """The version, or another with its bytes, was rolled back before."""


class SmokeFailed(RegistryError):
    """A version could not be loaded and asked in a clean process."""


class Unreachable(RegistryError):
    """The tracking server does not answer."""


class Unverified(RegistryError):
    """Bytes or lineage differ from what was recorded."""
