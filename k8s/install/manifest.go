package install

import (
	"bytes"
	"fmt"

	"sigs.k8s.io/yaml"
)

// Manifest is an installation as YAML documents, for who applies it by other means. The Secret with the authority is not in it.
func Manifest(o Options) ([]byte, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	objects, err := Objects(o)
	if err != nil {
		return nil, err
	}
	all, err := entries(objects)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	for i, e := range all {
		if i > 0 {
			out.WriteString("---\n")
		}
		text, err := yaml.Marshal(e.Object)
		if err != nil {
			return nil, fmt.Errorf("install: %s: %w", e, err)
		}
		out.Write(text)
	}
	return out.Bytes(), nil
}
