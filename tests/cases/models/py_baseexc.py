class E(BaseException):
    pass


def build():
    raise E("x")
