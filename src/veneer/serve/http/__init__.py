"""The HTTP surfaces: of text OpenAI's, vLLM's, LoRAX's and TGI's, llama.cpp's; of pictures OpenAI's; metrics, health.

app.py        the application: who may ask, how errors are told, what is mounted
service.py      what all surfaces share: engine, catalog, tenancy, text, limits; which mix a body names
running.py    one HTTP request through the engine: admitted, billed, measured, cancelled when its client leaves
prompts.py    texts, messages and token ids -> prompt; tokens -> texts and bytes
fields.py     bodies: unknown keys are refused with the nearest name; known ones honoured, ignored aloud or refused
images.py     pictures, with images_asked.py for what their bodies say
openai.py …   one file a surface, each body as its clients expect it
"""
