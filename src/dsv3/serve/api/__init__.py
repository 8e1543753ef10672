"""The engine behind HTTP, as OpenAI's and DeepSeek's clients speak it. app.py joins it all."""
