"""THE RECORD: what was built, from what, and which version is in use.

A defense's bundle becomes a version of the MLflow model ``DEFENSE.MODEL``.  The record is a
projection of dvc.lock: publishing the same lineage twice changes nothing, and the whole store can
be rebuilt from the artifacts.  Only the gate moves the alias ``production``.
"""
