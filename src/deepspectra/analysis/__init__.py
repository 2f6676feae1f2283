"""The science of the papers: one public function a file."""
