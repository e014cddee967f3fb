"""THE ORDER: what runs when, and what a person sees of it.

The stages and their order are those of dvc.yaml.  `driver` runs them as processes that cannot
outlive it, `pipeline` is the same as a Prefect flow, `record` hands the results to the registry,
and ``python -m flows`` is the command line.
"""
