"""What is spoken in tests of metrics, and at which rate."""

RATE = 16000
SENTENCE = "Please say the name of the person that you are calling."
