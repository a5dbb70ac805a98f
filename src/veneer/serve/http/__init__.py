"""The HTTP surfaces: of text OpenAI's, vLLM's, SGLang's, LoRAX's and TGI's; of pictures OpenAI's.

app.py         the application: the door of all requests, how errors are told, what is mounted; health, metrics
service.py     what all surfaces work with: engine, names, tenancy, limits, counts; who asks
bodies.py      JSON bodies: read within bounds, unknown keys refused with the nearest name
sampling.py    what a text's body asks of the sampler
prompts.py     texts, messages and token ids -> prompt; tokens -> texts and bytes
answers.py     one HTTP request through the text engine: admitted, billed, measured, cancelled when its client leaves
errors.py      one error, told as each surface tells it
sse.py, connection.py, metrics.py
surfaces/      one file a surface, each body as its clients expect it
"""
