package main

import (
	"os"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/etcdctl/v3/ctlv3"
	"go.etcd.io/etcd/etcdutl/v3/etcdutl"
	"go.etcd.io/etcd/server/v3/etcdmain"
)

// etcd does not return when it has served; it exits by itself.
func etcd() int {
	etcdmain.Main(os.Args)
	return 0
}

// etcdctl asks an etcd that runs, as for a snapshot.
func etcdctl() int {
	ctlv3.MustStart()
	return 0
}

// etcdutl works on the files of one that doesn't, as to restore a snapshot.
func etcdUtil() int {
	root := &cobra.Command{Use: "etcdutl", Short: "Work on the files of an etcd that does not run"}
	root.PersistentFlags().StringVarP(&etcdutl.OutputFormat, "write-out", "w", "simple", "set the output format (fields, json, protobuf, simple, table)")
	root.AddCommand(etcdutl.NewSnapshotCommand(), etcdutl.NewHashKVCommand(), etcdutl.NewDefragCommand(), etcdutl.NewVersionCommand())
	if root.Execute() != nil {
		return 1
	}
	return 0
}
