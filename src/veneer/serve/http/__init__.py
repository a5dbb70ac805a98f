"""The HTTP surfaces.

OpenAI's, vLLM's, SGLang's, LoRAX's and TGI's for text; OpenAI's for images.

app.py         the application: middleware for all requests, error handlers, routers; health, metrics
service.py     what all surfaces share: engine, names, tenancy, limits, metrics; the request's principal
bodies.py      JSON bodies: size limits, unknown keys rejected with the nearest name
sampling.py    sampling parameters of a text body
prompts.py     texts, messages and token ids -> prompt; tokens -> texts and bytes
answers.py     one HTTP request through the text engine: admitted, billed, measured, cancelled if its client
leaves
errors.py      one error, in each surface's format
sse.py, connection.py, metrics.py
surfaces/      one file per surface, with bodies in its clients' format
"""
