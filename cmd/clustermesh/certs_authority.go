package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"causeway/identity/pki"

	"github.com/spf13/cobra"
)

func newCertsAuthorityCommand(e *env) *cobra.Command {
	dir, cluster := ".", ""
	cmd := &cobra.Command{
		Use:   "authority",
		Short: "Make the authority of a new cluster",
		Long: `Make the certificate authority of a new cluster: ca.crt and ca.key, which whoever has can be that cluster. "clustermesh install" and "clustermesh kvstore" do it by themselves;
it is for those who bring them: as the Secret causeway-authority for the Helm chart, or with --pki and for "clustermesh kvstore init". Files that are there are kept.`,
		Example: "  clustermesh certs authority --cluster east --out east-pki",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			cert, key := filepath.Join(dir, pki.FileAuthority+".crt"), filepath.Join(dir, pki.FileAuthority+".key")
			for _, name := range []string{cert, key} {
				if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
					return fmt.Errorf("%s is there already: name another directory with --out, or remove it if no cluster has it", name)
				}
			}
			authority, err := pki.NewAuthority(cluster, e.now())
			if err != nil {
				return err
			}
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return err
			}
			if err := pki.WriteFiles(cert, key, pki.Pair{Cert: authority.CertPEM(), Key: authority.KeyPEM()}); err != nil {
				return err
			}
			e.printer().printf("ca.crt and ca.key of cluster %s are in %s, valid until %s\n", cluster, dir, minute(authority.Cert.NotAfter))
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "out", dir, "the `DIRECTORY` to write the files to")
	cmd.Flags().StringVar(&cluster, "cluster", "", "`name` of the cluster (required)")
	require(cmd, "cluster")
	return cmd
}
