package install

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"text/template"

	"sigs.k8s.io/yaml"
)

// TestChartIsCurrent compares the chart with what it would be made anew.
func TestChartIsCurrent(t *testing.T) {
	files, err := Chart()
	if err != nil {
		t.Fatal(err)
	}
	const dir = "../../deploy/helm/causeway"
	var there []string
	for _, pattern := range []string{"*.yaml", "templates/*"} {
		names, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			t.Fatal(err)
		}
		there = append(there, names...)
	}
	if len(there) != len(files) {
		t.Errorf("%d files are there, and %d are made: run go generate ./k8s/install", len(there), len(files))
	}
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not current (%v): run go generate ./k8s/install", name, err)
		}
	}
}

// TestChartIsTheInstallation has the chart make the same objects as the command does of the same options.
func TestChartIsTheInstallation(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"as it is":     func(*Options) {},
		"one member":   func(o *Options) { o.Members = 1 },
		"five members": func(o *Options) { o.Members, o.StorageClass, o.StorageSize = 5, "fast", "10Gi" },
		"chained":      func(o *Options) { o.Mode, o.APIServer = ModeChained, "" },
		"all else": func(o *Options) {
			o.ClusterID, o.Namespace, o.Encryption, o.Image = 7, "mesh", "off", "registry.example.com/c@sha256:0"
		},
		"IPv6 too":         func(o *Options) { o.PodCIDRs, _ = prefixes([]string{"10.1.0.0/16", "fd00:1::/48"}) },
		"API server by v6": func(o *Options) { o.APIServer = "[2001:db8::1]:6443" },
	} {
		o := testOptions()
		change(&o)
		if err := o.Check(); err != nil {
			t.Fatal(err)
		}
		want := map[string]any{}
		objects, err := Objects(o)
		if err != nil {
			t.Fatal(err)
		}
		all, err := entries(objects)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range all[2:] { // without the namespace and the options
			want[e.String()] = plain(t, e.Object)
		}
		got := render(t, o)
		for what := range want {
			if !reflect.DeepEqual(got[what], want[what]) {
				t.Errorf("%s: %s:\nchart   %v\ninstall %v", name, what, got[what], want[what])
			}
		}
		if len(got) != len(want) {
			t.Errorf("%s: the chart makes %d objects, the installation %d", name, len(got), len(want))
		}
	}
}

func plain(t *testing.T, object any) (out map[string]any) {
	t.Helper()
	text, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// render does with the chart what Helm does, as far as the chart makes use of it.
func render(t *testing.T, o Options) map[string]any {
	t.Helper()
	files, err := Chart()
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]any
	if err := yaml.Unmarshal(files["values.yaml"], &values); err != nil {
		t.Fatal(err)
	}
	values["clusterName"], values["clusterID"], values["image"], values["mode"] = o.ClusterName, float64(o.ClusterID), o.Image, o.Mode
	values["podCIDRs"], values["serviceCIDRs"], values["encryption"] = texts(o.PodCIDRs), texts(o.ServiceCIDRs), string(o.Encryption)
	host, port, _ := net.SplitHostPort(o.APIServer)
	values["apiServer"] = map[string]any{"host": host, "port": port}
	values["etcd"] = map[string]any{"members": float64(o.Members), "storageClass": o.StorageClass, "storageSize": o.StorageSize, "token": o.StoreToken}
	root := template.New("")
	root.Option("missingkey=error").Funcs(template.FuncMap{
		"quote": func(v any) string { return fmt.Sprintf("%q", v) },
		"int":   func(v any) int { return int(v.(float64)) },
		"toJson": func(v any) (string, error) {
			text, err := json.Marshal(v)
			return string(text), err
		},
		"until": func(n int) (all []int) {
			for i := range n {
				all = append(all, i)
			}
			return all
		},
		"default": func(fallback, v string) string {
			if v == "" {
				return fallback
			}
			return v
		},
		"required": func(why string, v any) (any, error) {
			if reflect.ValueOf(v).IsZero() {
				return nil, fmt.Errorf("%s", why)
			}
			return v, nil
		},
		"include": func(name string, data any) (string, error) {
			var out strings.Builder
			err := root.ExecuteTemplate(&out, name, data)
			return out.String(), err
		},
	})
	for name, text := range files {
		if strings.HasPrefix(name, "templates/") {
			if _, err := root.New(name).Parse(string(text)); err != nil {
				t.Fatal(err)
			}
		}
	}
	out := map[string]any{}
	for name := range files {
		if path.Dir(name) != "templates" || path.Ext(name) != ".yaml" {
			continue
		}
		var text bytes.Buffer
		if err := root.ExecuteTemplate(&text, name, map[string]any{"Values": values, "Release": map[string]any{"Name": "causeway", "Namespace": o.Namespace}}); err != nil {
			t.Fatal(err)
		}
		var object map[string]any
		if err := yaml.UnmarshalStrict(text.Bytes(), &object); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, text.String())
		}
		meta := object["metadata"].(map[string]any)
		what := fmt.Sprint(object["kind"], " ", meta["name"])
		if meta["namespace"] != nil {
			what = fmt.Sprint(object["kind"], " ", meta["namespace"], "/", meta["name"])
		}
		out[what] = object
	}
	return out
}
