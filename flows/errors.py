"""What can go wrong with a run, as a user sees it.

* FlowError             catch this to catch them all
  x AlreadyRunning      another run owns the project; its PID is in the message
  x BadPipeline         dvc.yaml cannot be read
  x StageFailed         a stage failed; its own message and the path of its log
  x Transient           a stage asks to be run again; only these are retried
  x RunFailed           the run as a whole: every stage that failed
  x Stale               what lies in the folders is not what dvc.lock says: run first
  x UnknownStage        a name on the command line that dvc.yaml does not have
"""


class FlowError(Exception):
    """An error of a run that a user can cure."""


class AlreadyRunning(FlowError):
    """Another run owns the project."""


class BadPipeline(FlowError):
    """The stages cannot be read."""


class StageFailed(FlowError):
    """A stage failed."""


class Transient(StageFailed):
    """A stage failed for a reason that may be gone the next time."""


class RunFailed(FlowError):
    """At least one stage failed."""


class Stale(FlowError):
    """What lies in the folders is not what dvc.lock says."""


class UnknownStage(FlowError):
    """No stage has this name."""
