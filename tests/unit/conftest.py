"""What holds for unit tests: an example that takes long is no finding, the machine may stop for a while."""

from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
