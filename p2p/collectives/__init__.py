"""Allreduce over shards: schedules are data (ring, butterfly, direct), one executor runs all."""
