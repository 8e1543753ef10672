"""``dsv3 bench interop``: a trained model of ours in other people's software, and what they find in it."""
