"""Samples in one normal form, and one loader a data set."""

from hauberk.data.samples import Sample, read_suite, stream_suite, write_suite

__all__ = ["Sample", "read_suite", "stream_suite", "write_suite"]
