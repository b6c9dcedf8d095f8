"""What needs Triton is run by test_triton.py, in processes of its own."""

collect_ignore_glob = ["interpreted/*", "compiled/*"]
