from tests.jobs.tiny_run import compiled, tiny_run

__all__ = ['compiled', 'tiny_run']
