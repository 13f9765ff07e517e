"""What a response is worth: reward functions by import path, and the verifiable ones that come with flowrl."""
