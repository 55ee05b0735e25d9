"""The rows that a finished run was measured on, made again exactly, or those of another file."""


