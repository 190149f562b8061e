def build():
    raise GeneratorExit
