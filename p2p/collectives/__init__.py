"""Allreduce over shards: schedules are data, one executor runs all but allgather."""
