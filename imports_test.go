// Package causeway_test holds the rules of the module as a whole: which folder may
// import what, and why. docs/architecture.md explains the layers; this file keeps them.
package causeway_test

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "causeway"

// layer is a folder's rule.
type layer struct {
	folder string
	may    []string // "..." is everything but testbed and cmd
	why    string
	tests  []string // what only its tests may import besides
}

// layers lists every folder with Go files, what of this module it may import, and why no more. A new
// folder needs a line here; a folder's own subfolders are separate and need their own.
var layers = []layer{
	{folder: ".", why: "the module's rules stand above all layers"},
	{folder: "kvstore", why: "it is about keys and values, whatever they mean, so that another store can take its place"},
	{folder: "lb", why: "it is pure: rows in, rows out, so that whole meshes are table tests"},
	{folder: "lb/l7", may: []string{"lb", "lb/l7/state", "lb/l7/balance", "lb/l7/exchange", "lb/l7/http1", "lb/l7/http2", "lb/l7/health", "lb/l7/observe"}, why: "it is a process of its own, which an agent only tells what to do"},
	{folder: "lb/l7/state", may: []string{"lb"}, why: "it is what agents and proxies say to each other"},
	{folder: "lb/l7/balance", may: []string{"lb", "lb/l7/state"}, why: "it only chooses: whole histories are table tests"},
	{folder: "lb/l7/exchange", may: []string{"lb", "lb/l7/state", "lb/l7/balance"}, why: "it is what all engines have in common"},
	{folder: "lb/l7/health", may: []string{"lb", "lb/l7/state", "lb/l7/balance"}, why: "it only asks backends, and tells the balancer"},
	{folder: "lb/l7/observe", may: []string{"lb", "lb/l7/state", "lb/l7/balance", "lb/l7/exchange"}, why: "it only counts and shows what the engines did"},
	{folder: "lb/l7/http1", may: []string{"lb", "lb/l7/state", "lb/l7/balance", "lb/l7/exchange"}, why: "it moves requests; whose they are is for others"},
	{folder: "lb/l7/http2", may: []string{"lb", "lb/l7/state", "lb/l7/balance", "lb/l7/exchange"}, why: "it moves requests; whose they are is for others",
		tests: []string{"lb/l7/http2/standard"}},
	{folder: "lb/l7/http2/standard", may: []string{"lb", "lb/l7/state", "lb/l7/balance", "lb/l7/exchange"}, why: "it is what tests compare the engine above with"},
	{folder: "lb/l7/xds", may: []string{"lb"}, why: "it only reads rows: who serves them to whom is the agent's",
		tests: []string{"identity/pki"}}, // Clients show certificates.
	{folder: "identity", may: []string{"kvstore", "lb"}, why: "it says who is who; how that is published or programmed is for others"},
	{folder: "identity/pki", may: []string{"lb"}, why: "it makes certificates; who keeps them where is for others"},
	{folder: "clustermesh", may: []string{"kvstore", "lb", "identity"}, why: "it only writes tables: it must work the same whatever the data path is"},
	{folder: "clustermesh/gossip", may: []string{"lb", "identity"}, why: "it says who is alive, and carries what others wrote; the tables are its user's"},
	{folder: "clustermesh/peering", may: []string{"kvstore", "lb", "identity", "identity/pki", "clustermesh/gossip"}, why: "it only writes records: what follows from them is its user's"},
	{folder: "clustermesh/gossip/sim", may: []string{"identity", "clustermesh/gossip"}, why: "it only asks how gossip behaves"},
	{folder: "tunnel", may: []string{"identity", "lb", "tunnel/tun"}, why: "it only reads rows: it must not care which channel brought them"},
	{folder: "tunnel/tun", why: "it is a device: what it carries for whom is for others"},
	{folder: "datapath", may: []string{"identity", "lb"}, why: "it only reads rows: it must not care which channel brought them",
		tests: []string{"tunnel", "tunnel/tun"}},
	{folder: "k8s", may: []string{"identity", "lb", "clustermesh"}, why: "it is a source: it turns Kubernetes' objects into rows, and says in Kubernetes what became of them",
		tests: []string{"kvstore", "identity/pki"}}, // A real API server has an etcd, and certificates.
	{folder: "k8s/cni", may: []string{"identity", "agent/api"}, why: "it turns what the CNI specification says into requests to the agent, and its answers back"},
	{folder: "agent/api", may: []string{"identity", "lb", "lb/l7/state"}, why: "clients of the agent must not link what the agent is made of"},
	{folder: "agent", may: []string{"..."}, why: "it wires everything together, so nothing else has to"},
	{folder: "testbed", may: []string{"..."}, why: "it runs agents as a user would; agents don't know of it"},
	{folder: "testbed/vm", why: "it boots a kernel for a test binary, whatever that tests"},
	{folder: "testbed/l7bench", why: "it measures proxies as programs, by their commands"},
	{folder: "cmd/clustermesh", may: []string{"...", "testbed"}, why: "it turns flags into one call of the others"},
}

// outside lists modules that belong to one layer.
var outside = []struct {
	prefix  string
	folders []string
	why     string
}{
	{"github.com/cilium/ebpf", []string{"datapath"}, "the kernel's maps have one writer, and their layout one home"},
	{"github.com/vishvananda", []string{"tunnel", "tunnel/tun", "datapath", "testbed"}, "links and namespaces are I/O at the edge"},
	{"go.etcd.io", []string{"kvstore"}, "the rest sees the Store interface, which has a fake"},
	{"k8s.io", []string{"k8s"}, "Kubernetes is one source among several, and a large dependency"},
	{"github.com/containernetworking", []string{"k8s/cni"}, "what runtimes say to plugins has one home"},
	{"sigs.k8s.io/controller-runtime", nil, "client-go's informers are enough"},
	{"github.com/hashicorp/memberlist", []string{"clustermesh/gossip", "clustermesh/gossip/sim"}, "gossip is one channel among several"},
	{"golang.zx2c4.com/wireguard", []string{"tunnel", "tunnel/tun"}, "encryption is part of the tunnel"},
	{"google.golang.org/grpc", []string{"kvstore", "clustermesh/peering", "lb/l7/xds", "testbed"}, "the API between clusters has one home, and Envoy's; pods of the test-bed speak it"},
	{"github.com/envoyproxy", []string{"lb/l7/xds"}, "Envoy's protocol has one home"},
	{"github.com/spf13", []string{"cmd/clustermesh"}, "flags end where the program begins"},
}

// outsideForTests are folders whose tests alone may import such a module besides.
var outsideForTests = map[string][]string{
	"github.com/containernetworking": {"agent"},                                        // A runtime is what the plugin stands before, and an agent behind it.
	"google.golang.org/grpc":         {"lb/l7/observe", "lb/l7/health", "lb/l7/http2"}, // A collector of traces is what a proxy's are sent to; gRPC's own servers and clients are what it stands between.
	"golang.zx2c4.com/wireguard":     {"datapath"},                                     // A bare tunnel is what the data path is measured beside.
}

// hiding are names of folders that say nothing of what is in them.
var hiding = []string{"util", "utils", "common", "helper", "helpers", "misc", "shared"}

// goFile is what the rules see of a file.
type goFile struct {
	path    string // slash-separated, from the module's root
	doc     bool   // has a package comment
	imports []string
}

func (f goFile) folder() string { return path.Dir(f.path) }
func (f goFile) test() bool     { return strings.HasSuffix(f.path, "_test.go") }

func TestImports(t *testing.T) {
	files := goFiles(t)
	for _, problem := range slices.Concat(importProblems(files), folderProblems(files)) {
		t.Error(problem)
	}
}

// importProblems returns a sentence for every import that breaks a rule.
func importProblems(files []goFile) (problems []string) {
	for _, f := range files {
		for _, imported := range f.imports {
			if why := refuse(f, imported); why != "" {
				problems = append(problems, fmt.Sprintf("%s imports %s: %s", f.path, imported, why))
			}
		}
	}
	return problems
}

// refuse says why a file may not import a package; empty if it may.
func refuse(f goFile, imported string) string {
	if of, ours := strings.CutPrefix(imported, module+"/"); ours {
		return refuseOurs(f, of)
	}
	for _, o := range outside {
		forTest := f.test() && slices.Contains(outsideForTests[o.prefix], f.folder())
		if under(imported, o.prefix) && !slices.Contains(o.folders, f.folder()) && !forTest {
			return fmt.Sprintf("%s is for %s alone: %s", o.prefix, orNobody(o.folders), o.why)
		}
	}
	return ""
}

func refuseOurs(f goFile, imported string) string {
	for _, l := range layers {
		if l.folder != f.folder() {
			continue
		}
		above := imported == "testbed" || under(imported, "cmd")
		everything := slices.Contains(l.may, "...") && !above
		forTest := f.test() && slices.Contains(l.tests, imported)
		if imported == l.folder || everything || forTest || slices.Contains(l.may, imported) {
			return ""
		}
		return fmt.Sprintf("%s may import %s: %s", l.folder, orNobody(l.may), l.why)
	}
	return "" // folderProblems reports a folder without a line
}

func under(imported, prefix string) bool {
	return imported == prefix || strings.HasPrefix(imported, prefix+"/")
}

func orNobody(list []string) string {
	if len(list) == 0 {
		return "none of them"
	}
	return strings.Join(list, ", ")
}

// folderProblems returns a sentence for every folder without a line in layers, without package documentation, or with a
// name that says nothing.
func folderProblems(files []goFile) (problems []string) {
	documented := map[string]bool{}
	for _, f := range files {
		onlyTests := f.folder() == "."
		documented[f.folder()] = documented[f.folder()] || f.doc && (onlyTests || !f.test())
	}
	for folder, ok := range documented {
		if !ok {
			problems = append(problems, folder+": no file has a package comment; say in one what the folder is for")
		}
		if slices.Contains(hiding, path.Base(folder)) {
			problems = append(problems, folder+": name the folder after what it can do")
		}
		if !slices.ContainsFunc(layers, func(l layer) bool { return l.folder == folder }) {
			problems = append(problems, folder+": no rule says what it may import; add it to layers in imports_test.go and to docs/architecture.md")
		}
	}
	slices.Sort(problems)
	return problems
}

// goFiles parses the head of every Go file of the module, whatever its build tags.
func goFiles(t *testing.T) (files []goFile) {
	t.Helper()
	err := filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && name != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || isModule(name)):
			return filepath.SkipDir
		case d.IsDir() || filepath.Ext(name) != ".go":
			return nil
		}
		source, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		f, err := parseHead(filepath.ToSlash(name), source)
		files = append(files, f)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func parseHead(name string, source []byte) (goFile, error) {
	parsed, err := parser.ParseFile(token.NewFileSet(), name, source, parser.ImportsOnly|parser.ParseComments)
	if err != nil {
		return goFile{}, err
	}
	f := goFile{path: name, doc: parsed.Doc != nil}
	for _, spec := range parsed.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return goFile{}, err
		}
		f.imports = append(f.imports, imported)
	}
	return f, nil
}

// TestRulesAreKept breaks each kind of rule once.
func TestRulesAreKept(t *testing.T) {
	for _, tc := range []struct{ file, source, want string }{
		{"lb/x.go", `import "causeway/identity"`, "it is pure"},
		{"clustermesh/x.go", `import "causeway/datapath"`, "clustermesh may import"},
		{"datapath/x.go", `import "causeway/kvstore"`, "which channel"},
		{"datapath/x.go", `import "causeway/tunnel"`, "datapath may import"},
		{"agent/x.go", `import "causeway/testbed"`, "agent may import"},
		{"agent/x_test.go", `import "github.com/cilium/ebpf/link"`, "one writer"},
		{"agent/x.go", `import "k8s.io/client-go/informers"`, "is for k8s alone"},
		{"identity/x.go", `import etcd "go.etcd.io/etcd/client/v3"`, "is for kvstore alone"},
		{"util/x.go", ``, "no rule says"},
		{"util/x.go", ``, "name the folder after"},
		{"lb/x.go", ``, "no file has a package comment"},
		{"agent/x.go", "import (\n\"causeway/kvstore\"\n\"causeway/agent/api\"\n)", ""},
		{"cmd/clustermesh/x.go", "import (\n\"causeway/testbed\"\n\"github.com/spf13/cobra\"\n)", ""},
	} {
		header := "// Package x is documented.\npackage x\n"
		if strings.Contains(tc.want, "comment") {
			header = "package x\n"
		}
		f, err := parseHead(tc.file, []byte(header+tc.source))
		if err != nil {
			t.Fatal(err)
		}
		files := []goFile{f}
		got := strings.Join(slices.Concat(importProblems(files), folderProblems(files)), "\n")
		if tc.want == "" && got != "" && !f.test() || !strings.Contains(got, tc.want) {
			t.Errorf("%s with %s: got %q, want %q", tc.file, tc.source, got, tc.want)
		}
	}
}

// isModule tells whether a folder is a module of its own, whose imports are its own affair.
func isModule(folder string) bool {
	_, err := os.Stat(filepath.Join(folder, "go.mod"))
	return err == nil
}
