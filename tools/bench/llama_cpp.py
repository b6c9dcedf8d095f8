"""llama.cpp by way of llama-cpp-python, on a GGUF copy of the model that is kept."""

from itertools import islice
from pathlib import Path

from tools.bench.work import Answers, Settings, Work


class LlamaCpp:
    """Float32, one prompt at a time."""

    def __init__(self, settings: Settings) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self.version = llama_cpp.__version__
        if settings.dtype != "float32":
            raise ValueError(f"measured in float32 only, {settings.dtype} was asked for")
        file = Path(settings.converted) / "float32.gguf"
        if not file.exists():
            write_gguf(settings.model, file)
        self.model = llama_cpp.Llama(
            str(file), n_ctx=settings.max_length, n_threads=settings.threads, n_threads_batch=settings.threads, verbose=False
        )

    def run(self, work: Work) -> Answers:
        if work.concurrency > 1:
            raise ValueError("llama-cpp-python generates for one prompt at a time")
        answers = []
        for seed, prompt in enumerate(work.prompts):
            self.model.reset()  # or it would keep the cache of what two prompts have in common
            self.model.set_seed(seed)
            tokens = self.model.generate(prompt, temp=work.temperature, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
            answers.append(list(islice(tokens, work.max_tokens)))
        return Answers(answers)


def write_gguf(model: str, file: Path) -> None:
    """A model of type llama without its tokenizer: prompts are token ids. llama.cpp's own converter knows the published tokenizers only.

    Raises ValueError for other models and for scaled RoPE.
    """
    import gguf  # type: ignore[import-not-found]
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = loaded.config
    if config.model_type != "llama" or config.rope_parameters["rope_type"] != "default":
        raise ValueError(f"only models of type llama without RoPE scaling are converted, {model} is another")
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(str(unfinished), "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in loaded.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # its RoPE turns neighbours, transformers' turns halves
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(file)
