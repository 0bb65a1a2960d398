"""Studies: models × formats × methods × tasks, from a file to results that can be resumed and compared.

The room is not called `study`, for ``microscale.study`` is the job.
"""
