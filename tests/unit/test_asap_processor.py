"""tmp"""
from asap_laws import AsapLaws


class TestOnTheCpu(AsapLaws):
    pass
