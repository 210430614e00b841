"""`slipway demo`"""
def demo() -> str:
    """x"""
    return ""
